"""Counting n-grams as training: each batch is counted, and probabilities are estimated before each evaluation."""

import shutil
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
import transformers
from torch import Tensor

from lm_lightning.baselines.counts import Counter
from lm_lightning.baselines.kneser_ney import estimate
from lm_lightning.baselines.ngram import NGramForCausalLM
from lm_lightning.data import contract
from lm_lightning.data.tokenizer import vocabulary
from lm_lightning.errors import UserError
from lm_lightning.models.gpt import CausalLM
from lm_lightning.optim import Schedule

COUNTS = "counts"  # folder in a run folder


class NoOptimizer(torch.optim.Optimizer):
    """An optimizer that changes nothing, for a model without gradients."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.0})

    def step(self, closure: Any = None) -> Any:
        return None if closure is None else closure()


class NGramLM(CausalLM):
    """An n-gram language model with modified Kneser-Ney smoothing, which is counted in one epoch.

    Each training sample is counted once, however often it is read. The n-grams are counted in files of the run folder
    (`counts/`); probabilities are estimated from these before each evaluation and each checkpoint. The training loss of
    a batch is that under the latest probabilities, which do not include the batch.

    Args:
        network: Settings of the n-gram model: `{model_type: ngram, order: 5}`.
        pretrained: Run folder or `from_pretrained` folder of an n-gram model that is evaluated, instead of `network`.
        ngrams_in_memory: Number of n-grams that are sorted in memory at a time, with about 100 bytes each.
    """

    def __init__(
        self,
        network: Optional[dict[str, Any]] = None,
        pretrained: Optional[str] = None,
        ngrams_in_memory: int = 4_000_000,
    ) -> None:
        if ngrams_in_memory < 1:
            raise UserError(f"model.ngrams_in_memory is {ngrams_in_memory}, but must be 1 or more")
        schedule = Schedule("constant", warmup_steps=0)
        super().__init__(
            unigram_start=False, network=network, pretrained=pretrained, optimizer=NoOptimizer, schedule=schedule
        )
        self.ngrams_in_memory = ngrams_in_memory
        self.counter: Counter = None  # type: ignore[assignment]  # made by `on_fit_start`
        self.counted = np.zeros(0, bool)  # whether each sample was counted, by its id
        self.estimated = 0  # number of n-grams in the current probabilities
        self.resumed: Optional[dict[str, Any]] = None

    # Network

    def new_network(self) -> transformers.PreTrainedModel:
        settings = dict(self.settings or {})
        if self.tokenizer is not None:  # without rows of padding, which would get a share of the probability
            settings.setdefault("vocab_size", vocabulary(self.tokenizer))
        return self.builder().new(settings)

    def network_made(self) -> None:
        if not isinstance(self.network, NGramForCausalLM):
            raise UserError(f"NGramLM counts n-grams, but the network is a {self.network.config.model_type}: use ngram")
        self.network.config.pad_token_id = None
        self.has_linear_head = False

    # Counting

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.trainer.world_size > 1:
            raise UserError("n-grams are counted in one process: set trainer.devices and trainer.num_nodes to 1")
        if self.pretrained is not None:
            raise UserError("an n-gram model cannot be trained further: give model.network instead of model.pretrained")
        folder = Path(self.trainer.default_root_dir) / COUNTS
        self.counter = Counter(folder, self.network.config.order, self.ngrams_in_memory)
        state = self.resumed or {"files": [], "total": 0}
        self.counter.resume(state["files"], state["total"])
        self.estimated = self.counter.total

    def loss(self, batch: dict) -> tuple[Tensor, Tensor]:
        targets, chosen = batch["targets"], batch["targets"] != -100
        windows, known = self.network.windows(
            batch["input_ids"], batch.get("position_ids"), batch.get("attention_mask")
        )
        with torch.no_grad():
            found = self.network.probabilities_of(windows[chosen], known[chosen], targets[chosen])
        loss = -found.log().sum()
        if self.training and self.counter is not None:
            self.count(batch, windows, known)
            loss = loss + 0 * self.network.unigrams.weight.sum()  # Lightning needs a loss with a gradient
        return loss, chosen.sum()

    def count(self, batch: dict, windows: Tensor, known: Tensor) -> None:
        """Counts the samples of a batch that have not been counted yet."""
        inputs, targets = batch["input_ids"], batch["targets"]
        rows = self.new_rows(contract.sample_ids(batch), len(targets))
        follows = (known[:, 1:] == 1) | (inputs[:, 1:] == targets[:, :-1])
        if not bool(follows[rows].all() & (targets[rows] >= 0).all()):
            raise UserError(
                f"{type(self.trainer.datamodule).__name__} has targets that are not the next tokens, whose n-grams "
                "cannot be counted: use PretrainingData"
            )
        tokens = [tensor[rows].flatten(0, 1).cpu().numpy() for tensor in (windows, known, targets)]
        self.counter.add(*tokens)

    def new_rows(self, ids: list[int], size: int) -> Tensor:
        """The rows of a batch whose samples have not been counted, (N,) int64; those without ids are counted."""
        if not ids:
            return torch.arange(size)
        if (most := max(ids)) >= len(self.counted):
            self.counted = np.concatenate([self.counted, np.zeros(most + 1, bool)])
        rows = [row for row, sample in enumerate(ids) if sample >= 0 and not self.counted[sample]]
        self.counted[[ids[row] for row in rows]] = True
        return torch.tensor(rows, dtype=torch.long)

    def update(self) -> None:
        """Estimates probabilities from all counts so far, if there are new ones."""
        if self.counter is None or self.counter.total == self.estimated:
            return
        new = self.counter.folder / f"estimate-{self.counter.total}"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        levels = self.counter.adjusted(new)
        tables = estimate(levels, self.network.config.vocab_size, new, self.ngrams_in_memory)
        self.network.set_tables(tables)
        self.estimated = self.counter.total
        for folder in self.counter.folder.glob("estimate-*"):
            if folder != new:
                shutil.rmtree(folder, ignore_errors=True)  # (Windows keeps what is still mapped)
        sizes = [self.network.config.vocab_size, *self.network.config.sizes]
        orders = zip(range(1, len(sizes) + 1), sizes, tables.discounts, tables.estimated)
        text = ", ".join(
            f"{order}: {size:,} (discounts {' '.join(f'{value:.2f}' for value in values)}"
            f"{'' if enough else ', too few n-grams to estimate them'})"
            for order, size, values, enough in orders
        )
        self.print(f"n-grams after {self.counter.total:,} tokens: {text}")

    def on_validation_start(self) -> None:
        super().on_validation_start()
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.update()

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.update()

    def distillation_loss(self, batch: dict, teacher: Any, distiller: Any) -> tuple[Tensor, Tensor, Tensor]:
        raise UserError("NGramLM counts tokens, and cannot be trained with a teacher: omit the callback Distillation")

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        self.update()
        checkpoint["state_dict"] = self.state_dict()
        super().on_save_checkpoint(checkpoint)
        if self.counter is not None:
            self.counter.flush()
            counted = torch.from_numpy(np.packbits(self.counted))
            checkpoint["ngrams"] = {
                "files": list(self.counter.files),
                "total": self.counter.total,
                "counted": counted,
            }

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.network.resize(checkpoint["network"]["config"].get("sizes", self.network.config.sizes))
        super().on_load_checkpoint(checkpoint)
        if self.trainer.state.fn == "fit":
            self.resumed = checkpoint["ngrams"]
            self.counted = np.unpackbits(self.resumed["counted"].numpy()).astype(bool)
