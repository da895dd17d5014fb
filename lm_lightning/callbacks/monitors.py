"""Monitors: checks, before training, what checkpoints and early stopping monitor, and sets the right direction."""

from typing import Any, Optional

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lm_lightning.errors import UserError
from lm_lightning.models.metrics import Mode

TRAINING: dict[str, Optional[Mode]] = {  # what is logged in training; None: neither direction is better
    **dict.fromkeys(("train/loss", "train/distillation"), "min"),
    **dict.fromkeys(("train/tokens_per_second", "train/mfu"), "max"),
    **dict.fromkeys(("train/gradient_norm", "train/learning_rate", "train/skipped_steps", "train/sparsity")),
    **dict.fromkeys(("train/tokens", "train/seconds", "train/memory", "train/compilations")),
}


class Monitors(Callback):
    """Refuses metrics that will not be logged and directions that are wrong, and derives those that were not given."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        known = TRAINING | {f"val/{name}": mode for name, mode in pl_module.metric_modes().items()}
        # The metrics of a user's own module or callback are not known before they are logged.
        own = [type(part).__module__ for part in (pl_module, *trainer.callbacks)]
        complete = all(name.startswith(("lm_lightning.", "lightning.")) for name in own)
        for callback in trainer.callbacks:
            if isinstance(callback, (ModelCheckpoint, EarlyStopping)) and callback.monitor is not None:
                if callback.monitor in known:
                    set_mode(callback, known[callback.monitor])
                elif complete:
                    raise UserError(
                        f"{option(callback)}.monitor is {callback.monitor}, which this run does not log: choose one of "
                        + ", ".join(known)
                    )


def option(callback: Any) -> str:
    """What a callback is called on the command line: `best`, `last`, or its class."""
    return getattr(callback, "option", type(callback).__name__)


def set_mode(callback: Any, mode: Optional[Mode]) -> None:
    """Gives a callback the direction of its metric.

    Raises:
        UserError: If it was given the other one.
    """
    # Lightning's own classes have `min` where none was given, which is then indistinguishable from a given `min`.
    given = callback.given_mode if hasattr(callback, "given_mode") else "max" if callback.mode == "max" else None
    if mode is None or mode == callback.mode:
        return
    if given is not None:
        better = {"min": "lower", "max": "higher"}[mode]
        raise UserError(
            f"{option(callback)}.mode is {given}, but {callback.monitor} is better the {better} it is: omit the mode, "
            "or monitor another metric"
        )
    callback.mode = mode
    worst = torch.tensor(float("inf") if mode == "min" else float("-inf"))
    if isinstance(callback, ModelCheckpoint):
        callback.kth_value = worst
    else:
        callback.best_score = worst
        callback.min_delta = -callback.min_delta
