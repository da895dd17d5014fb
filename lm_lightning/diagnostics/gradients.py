"""Histograms of gradients."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.distributed.tensor import DTensor

from lm_lightning.errors import UserError


class Gradients(Callback):
    """Logs a histogram of the gradient of each parameter, as the optimizer uses it: over all micro-batches and
    processes, and after clipping. It is logged to TensorBoard, and to loggers that have a method
    `log_histograms(histograms, step)`, such as `WandbRun`; `histograms` maps names to results of `torch.histogram`.

    Args:
        every_n_steps: Number of optimizer steps between two histograms.
        bins: Number of bins of a histogram.
    """

    def __init__(self, every_n_steps: int = 100, bins: int = 64) -> None:
        if every_n_steps < 1 or bins < 1:
            raise UserError(f"Gradients has every_n_steps {every_n_steps} and bins {bins}, but both must be 1 or more")
        self.every_n_steps, self.bins = every_n_steps, bins

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps or pl_module.optimizer_steps.current is not None:
            return
        histograms = {}
        for name, parameter in pl_module.network.named_parameters():
            gradient = parameter.grad
            if isinstance(gradient, DTensor):
                gradient = gradient.full_tensor()  # all processes must call it
            if gradient is not None and trainer.is_global_zero:
                histograms[f"gradients/{name}"] = gradient.float().cpu()
        for logger in trainer.loggers if histograms else ():
            if isinstance(logger, TensorBoardLogger):
                for name, values in histograms.items():
                    logger.experiment.add_histogram(name, values, trainer.global_step, max_bins=self.bins)
            elif hasattr(logger, "log_histograms"):
                counts = {name: torch.histogram(values, self.bins) for name, values in histograms.items()}
                logger.log_histograms(counts, trainer.global_step)
