"""The learning-rate range test: increases the learning rate at every step to find at which rates a network learns."""

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class LearningRateRangeTest(Callback):
    """Multiplies the learning rate by the same factor at each step of a run, and ends the run when the loss is four
    times its minimum so far (Smith, 2017, Cyclical Learning Rates for Training Neural Networks, arXiv:1506.01186).

    Args:
        low: Learning rate of the first step.
        high: Learning rate of the last step, `trainer.max_steps`.
    """

    def __init__(self, low: float = 1e-6, high: float = 1.0) -> None:
        self.low, self.high, self.least = low, high, math.inf

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        rate = self.low * (self.high / self.low) ** (trainer.global_step / max(1, trainer.max_steps - 1))
        for group in pl_module.optimizers().param_groups:
            group["lr"] = rate * group.get("lr_factor", 1.0)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        loss = trainer.logged_metrics.get("train/loss")
        if loss is not None:  # all processes have logged the same
            self.least = min(self.least, float(loss))
            trainer.should_stop = trainer.should_stop or float(loss) > 4 * self.least
