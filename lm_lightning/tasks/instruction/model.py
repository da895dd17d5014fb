"""Instruction tuning: causal networks that answer."""

from typing import Any, Optional

from torch import Tensor

from lm_lightning.data import contract
from lm_lightning.data.order import PADDING
from lm_lightning.errors import UserError
from lm_lightning.generation.evaluation import Task, TextEvaluation
from lm_lightning.generation.generation import generate
from lm_lightning.generation.sampling import Sampling, check
from lm_lightning.models.gpt import CausalLM
from lm_lightning.models.metrics import Mode
from lm_lightning.strategies.capabilities import capabilities


class InstructionLM(CausalLM):
    """A `CausalLM` that is trained on conversations and writes answers, for `predict` and to be scored.

    Args:
        evaluation: Scores of the answers that it writes: the last one of each conversation, after the correct ones.
        max_new_tokens: Maximum number of tokens of an answer.
        sampling: How the tokens of an answer are chosen.
        options: Options of all models, see `LanguageModule`.
    """

    def __init__(
        self,
        evaluation: TextEvaluation = TextEvaluation(),
        max_new_tokens: int = 256,
        sampling: Sampling = Sampling(greedy=True),
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check(1, max_new_tokens, sampling)
        evaluation.check()
        self.evaluation, self.max_new_tokens, self.sampling = evaluation, max_new_tokens, sampling

    def network_made(self) -> None:
        super().network_made()
        writes = self.evaluation.scores or self.trainer.state.fn == "predict"
        if writes and self.trainer.world_size > 1 and capabilities(self.trainer.strategy).shards_parameters:
            raise UserError(
                f"{type(self.trainer.strategy).__name__} shards the parameters, with which processes cannot write "
                "different answers: use --trainer.strategy ddp, or omit model.evaluation.scores"
            )

    def answers(self, prompts: list[list[int]], names: Optional[list[str]] = None) -> list[str]:
        """The answers to some prompts, given as ids; `names` of the prompts are for messages."""
        return generate(
            self.network,
            self.trainer.datamodule.tokenizer,
            prompts,
            self.max_new_tokens,
            self.sampling,
            vocab_size=self.vocab_size,
            names=names,
        )

    def metric_modes(self) -> dict[str, Optional[Mode]]:
        return super().metric_modes() | self.evaluation.modes()

    def metrics(self, loss: Tensor, split: str) -> dict[str, Tensor]:
        """Adds the scores of the answers to those of a `CausalLM`."""
        values = super().metrics(loss, split)
        if not self.evaluation.scores:
            return values
        content, tokenizer = self.trainer.datamodule.content[split], self.trainer.datamodule.tokenizer
        asked = [content.question(number) for number in range(len(content))]
        task = Task(
            sources=[tokenizer.decode(prompt) for prompt, _ in asked],
            references=[[tokenizer.decode(answer, skip_special_tokens=True)] for _, answer in asked],
            lengths=[len(prompt) for prompt, _ in asked],
            generate=lambda rows: self.answers([asked[row][0] for row in rows]),
        )
        return values | self.evaluation.run(self, task)

    def predict_step(self, batch: dict, batch_idx: int) -> list[dict]:
        """For each row: its number, `id`, and the `text` of the answer."""
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
        rows = [number for number, sample in enumerate(batch["id"]) if sample != PADDING]
        inputs = contract.optional(self.trainer.datamodule, "inputs")
        names = [inputs[batch["id"][row]].where for row in rows]
        texts = self.answers([prompts[row] for row in rows], names) if rows else []
        return [{"id": batch["id"][row], "text": text} for row, text in zip(rows, texts)]
