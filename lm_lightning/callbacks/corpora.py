"""Corpora: counts the samples of each corpus of a mixture, and logs the losses of each corpus."""

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lm_lightning import files
from lm_lightning.data import contract
from lm_lightning.models.metrics import bits_per_byte
from lm_lightning.security.redaction import redact


class Corpora(Callback):
    """Logs and prints what a mixture of corpora consists of; does nothing without one.

    In training, `corpora/NAME/tokens`, `corpora/NAME/epochs` and `corpora/NAME/share` are what was used of each corpus
    so far: tokens, passes over its training split, and its share of all samples. At the end, they are also in
    `data.json`. In evaluations, `val/NAME/loss` and, of GPTs, `val/NAME/bits_per_byte` are those of each corpus.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data, mixture = trainer.datamodule, contract.optional(trainer.datamodule, "mixture")
        if mixture is None:
            return
        self.stage = mixture.interleaving.stage(data.consumed)
        pl_module.print(f"mixture: {mixture.describe(data.consumed)}")
        for stage in mixture.interleaving.stages[self.stage + 1 :]:
            if mixture.end is not None and stage.start >= mixture.end:
                pl_module.print("mixture: the training ends before the next stage of data.stages begins")
                break
        if mixture.end is not None:
            used = mixture.seen(mixture.end, data.overfit_samples)
            passes = ", ".join(f"{name} {counts['epochs']:.2f}" for name, counts in used.items())
            pl_module.print(f"mixture: passes over each corpus in all of the training: {passes}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        data, mixture = trainer.datamodule, contract.optional(trainer.datamodule, "mixture")
        if mixture is None or pl_module.optimizer_steps.current is not None:  # the optimizer has not stepped yet
            return
        if (stage := mixture.interleaving.stage(data.consumed)) != self.stage and not data.overfit_samples:
            self.stage = stage
            pl_module.print(f"mixture, from step {trainer.global_step}: {mixture.describe(data.consumed)}")
        if trainer.global_step % trainer.log_every_n_steps == 0:
            used = data.used_samples()
            pl_module.log_dict(
                {
                    f"corpora/{name}/{count}": torch.tensor(float(value))
                    for name, counts in used.items()
                    for count, value in counts.items()
                }
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule
        if contract.optional(data, "mixture") is None:
            return
        for name, counts in data.used_samples().items():
            pl_module.print(
                f"corpus {name}: {counts['tokens']:,} tokens, {counts['share']:.2%} of the training, "
                f"{counts['epochs']:.2f} epochs"
            )
        file = Path(trainer.default_root_dir) / "data.json"
        if trainer.is_global_zero and file.exists():
            files.write_text(file, json.dumps(redact(data.info), indent=2))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        pl_module.val_loss.corpus = contract.corpus_of(batch)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        pl_module.val_loss.corpus = contract.corpus_of(batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        log_losses(trainer, pl_module, "val", "validation")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        log_losses(trainer, pl_module, "test", "test")


def log_losses(trainer: Trainer, pl_module: LightningModule, prefix: str, split: str) -> None:
    """Logs the losses of each corpus in an evaluation, before the model resets them."""
    sizes = contract.optional(trainer.datamodule, "corpus_sizes").get(split, {})
    metrics = {}
    for name, part in pl_module.val_loss.parts.items():
        metrics[f"{prefix}/{name}/loss"] = loss = part.compute()
        if name in sizes and "bits_per_byte" in pl_module.metric_modes():
            size = sizes[name]
            metrics[f"{prefix}/{name}/bits_per_byte"] = bits_per_byte(loss, len(size.tokens) - 1, size.bytes)
    pl_module.log_dict(metrics)


def metric_names(trainer: Trainer, pl_module: LightningModule) -> list[str]:
    """The names of the metrics of the corpora in validations, without `val/`; lower is better for all of them."""
    kinds = [name for name in ("loss", "bits_per_byte") if name in pl_module.metric_modes()]
    names = contract.optional(trainer.datamodule, "corpus_sizes").get("validation", {})
    return [f"{name}/{kind}" for name in names for kind in kinds]
