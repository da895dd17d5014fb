"""Checks before training the metrics that checkpoints and early stopping monitor, and sets their modes."""

from typing import Any, Optional

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lm_lightning.callbacks.corpora import metric_names
from lm_lightning.errors import UserError
from lm_lightning.models.metrics import Mode

TRAINING: dict[str, Optional[Mode]] = {  # training metrics; None: neither direction is better
    **dict.fromkeys(("train/loss", "train/distillation"), "min"),
    **dict.fromkeys(("train/tokens_per_second", "train/mfu"), "max"),
    **dict.fromkeys(("train/gradient_norm", "train/learning_rate", "train/skipped_steps", "train/sparsity")),
    **dict.fromkeys(("train/tokens", "train/seconds", "train/memory", "train/compilations")),
}


class Monitors(Callback):
    """Refuses to monitor metrics that will not be logged, refuses wrong modes, and sets modes that were not given."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        known = TRAINING | {f"val/{name}": mode for name, mode in pl_module.metric_modes().items()}
        known |= dict.fromkeys((f"val/{name}" for name in metric_names(trainer, pl_module)), "min")
        # The metrics of a user's own module or callback are unknown until they are logged.
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
    """The name of a callback on the command line: `best`, `last`, or its class."""
    return getattr(callback, "option", type(callback).__name__)


def set_mode(callback: Any, mode: Optional[Mode]) -> None:
    """Sets the mode of a callback to the mode of its metric.

    Raises:
        UserError: If the user has given the opposite mode.
    """
    # Lightning's own classes have `min` by default, so whether the user has given `min` is unknown.
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
