"""Samples: text that the network generates at each validation."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lm_lightning.console import printable
from lm_lightning.errors import UserError
from lm_lightning.files import append
from lm_lightning.generation.generation import describe_generation_config, generate, prompt_ids
from lm_lightning.generation.sampling import Sampling, check
from lm_lightning.strategies.capabilities import capabilities


class Samples(Callback):
    """Generates text after each validation, prints it and appends it to `samples.jsonl` in the run folder.

    The same prompts and seed are used each time, so that differences between samples are due to training, not chance.

    Args:
        prompts: Texts to continue; an empty one starts a new document.
        max_new_tokens: Maximum number of tokens of a sample.
        sampling: How tokens are chosen.
    """

    def __init__(
        self,
        prompts: Sequence[str] = ("",),
        max_new_tokens: int = 50,
        sampling: Sampling = Sampling(temperature=0.8, top_k=50),
    ) -> None:
        check(len(prompts), max_new_tokens, sampling)
        self.prompts, self.max_new_tokens, self.sampling = prompts, max_new_tokens, sampling

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.tokenizer is None:
            raise UserError("Samples need a tokenizer, which the data module does not have: omit the callback Samples")
        if message := describe_generation_config(pl_module.network, trainer.datamodule.tokenizer):
            pl_module.print(f"samples: {printable(message)}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        network, tokenizer = pl_module.network, trainer.datamodule.tokenizer
        if capabilities(trainer.strategy).lazy:  # it would compile a program for each length
            network = copy.deepcopy(network).cpu()
        prompts = [prompt_ids(tokenizer, prompt) for prompt in self.prompts]
        texts = generate(
            network, tokenizer, prompts, self.max_new_tokens, self.sampling, vocab_size=pl_module.vocab_size
        )  # all processes must call it, since the network may be sharded over them
        if not trainer.is_global_zero:
            return
        file = Path(trainer.default_root_dir) / "samples.jsonl"
        for prompt, text in zip(self.prompts, texts):
            row = {"step": trainer.global_step, "prompt": prompt, "text": text}
            append(file, json.dumps(row, ensure_ascii=False) + "\n")
            pl_module.print(f"sample: {printable(prompt)}|{printable(text)}")
        text = "\n\n".join(f"**{prompt}**{text}" for prompt, text in zip(self.prompts, texts))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("samples", text, trainer.global_step)
            elif hasattr(logger, "log_text"):  # tables, as Lightning's WandbLogger has them
                rows = [[trainer.global_step, *row] for row in zip(self.prompts, texts)]
                logger.log_text("samples", ["step", "prompt", "text"], rows, step=trainer.global_step)
