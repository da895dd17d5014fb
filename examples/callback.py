"""A callback: logs how far training has moved the weights."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Distance(Callback):
    """Logs `train/distance`, the distance of the weights from those at the start of this process.

    Args:
        every_n_steps: Number of optimizer steps between two values.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        self.every_n_steps = every_n_steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start = [parameter.detach().clone() for parameter in pl_module.parameters()]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            moved = [(new.detach() - old).norm() for new, old in zip(pl_module.parameters(), self.start)]
            pl_module.log("train/distance", torch.stack(moved).norm())
