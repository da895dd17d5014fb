"""When checkpoints are saved: `best`, chosen by a validation metric, and `last`, from which runs are resumed."""

import os
from typing import Any, Literal, Optional

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lm_lightning.compat import lightning as compat


class Checkpoints(ModelCheckpoint):
    """Lightning's ModelCheckpoint, changed so that runs resume exactly: it saves only between optimizer steps.

    A checkpoint has the score of its own step. It is saved after the metrics of the step have been logged. A score that
    is not finite is never the best.

    Args:
        filename: Name of the files, without `.ckpt`. If several are kept (`save_top_k` is not 1), `-{step}` and the
            score are appended, unless the name contains `{step}`.
        monitor: Metric that decides which checkpoint is the best, such as `val/loss`. Default: for `best`, the main
            metric of the task, such as `val/accuracy`; `last` has none and keeps the newest checkpoint.
        save_top_k: Number of best checkpoints to keep, -1 for all, 0 for none.
        mode: `min` if lower values of the metric are better, `max` if higher ones are. Default: the mode of the metric.
        options: Other options of Lightning's ModelCheckpoint.
    """

    validated = -1  # the step of the last validation
    option = "checkpoints"  # its name on the command line

    def __init__(
        self,
        filename: Optional[str] = None,
        monitor: Optional[str] = None,
        save_top_k: int = 1,
        mode: Optional[Literal["min", "max"]] = None,
        **options: Any,
    ) -> None:
        if save_top_k not in (0, 1) and filename and "{step" not in filename:
            score = f"-{{{monitor}:.4f}}" if monitor and "{" not in filename else ""
            filename += "-{step}" + score
        super().__init__(filename=filename, monitor=monitor, save_top_k=save_top_k, mode=mode or "min", **options)
        self.given_mode = mode

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        worst_first = sorted(self.best_k_models, key=lambda path: self.best_k_models[path], reverse=self.mode == "min")
        # With a lower save_top_k than before, some are too many.
        for path in worst_first[: -self.save_top_k] if self.save_top_k > 0 else ():
            del self.best_k_models[path]
            trainer.strategy.remove_checkpoint(path)
        if self.best_k_models:
            self.kth_best_model_path = next(path for path in worst_first if path in self.best_k_models)
            self.kth_value = self.best_k_models[self.kth_best_model_path]

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: Lightning saves here, before the step is logged, and during gradient accumulation."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any = None, batch_idx: int = 0
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0 and trainer.global_step > pl_module.resumed_at:
            super().on_train_batch_end(trainer, pl_module, None, batch, batch_idx)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        # A validation may take long. The last step is saved at the end, as a run is never resumed from there.
        if self.monitor is not None or trainer.global_step < pl_module.total_steps():
            self.on_train_batch_start(trainer, pl_module)

    def has_best(self) -> bool:
        """Whether one of its files is the best checkpoint of this run."""
        here = os.path.dirname(self.best_model_path) == str(self.dirpath)
        return self.monitor is not None and self.best_model_score is not None and here

    def _should_save_on_train_epoch_end(self, trainer: Trainer) -> bool:
        # Lightning would save at the end of each epoch, before the validation of its last step.
        if compat.saves_by_default(self) and sum(trainer.num_val_batches):
            return False
        return super()._should_save_on_train_epoch_end(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validated = trainer.global_step
        super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_batch_start(trainer, pl_module)
        super().on_train_end(trainer, pl_module)

    def _monitor_candidates(self, trainer: Trainer) -> dict[str, Tensor]:
        # Lightning keeps the metrics of a validation for later steps.
        metrics = super()._monitor_candidates(trainer)
        if self.validated != trainer.global_step:
            metrics |= {name: torch.tensor(float("nan")) for name in metrics if name.startswith("val/")}
            if str(self.monitor).startswith("val/"):
                metrics.pop(self.monitor, None)  # it is saved after the next validation
        return metrics

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        # Lightning fails here if an epoch or the run ends at a step that was not validated.
        if self.monitor is None or self.monitor in monitor_candidates:
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def check_monitor_top_k(self, trainer: Trainer, current: Optional[Tensor] = None) -> bool:
        """Whether a score is one of the best; False if it is not finite."""
        return current is not None and bool(current.isfinite()) and super().check_monitor_top_k(trainer, current)
