"""Prints why a run ended, and refuses to resume a run that has ended."""

from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, Optional

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from lm_lightning.compat import lightning as compat
from lm_lightning.errors import UserError
from lm_lightning.run import is_unfinished

THRESHOLDS = ("stopping_threshold", "divergence_threshold", "check_finite")


class Ending(Callback):
    """Prints why training ended, and refuses to resume a run that has ended.

    A run has ended when it has reached `trainer.max_steps`, `trainer.max_epochs` or `trainer.max_time`, or when
    EarlyStopping has stopped it. It can be resumed with a higher limit or a higher patience.
    """

    def __init__(self) -> None:
        self.stopped = False  # whether EarlyStopping had stopped the run before its checkpoint was saved
        self.started = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["early_stopping"] = {
            callback.state_key: {name: getattr(callback, name) for name in THRESHOLDS}
            for callback in early_stoppings(trainer)
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        states, reason = checkpoint["callbacks"], None
        for callback in early_stoppings(trainer):
            if (state := states.get(callback.state_key)) is None:
                continue
            state["patience"] = callback.patience  # Lightning would restore the one in the checkpoint
            patience = state["stopping_reason"] == EarlyStoppingReason.PATIENCE_EXHAUSTED.value
            thresholds = {name: getattr(callback, name) for name in THRESHOLDS}
            if state["stopping_reason"] == EarlyStoppingReason.NOT_STOPPED.value:
                stopped = state["wait_count"] >= callback.patience  # also if the patience was lowered
            elif patience:
                stopped = state["wait_count"] >= callback.patience
            else:
                stopped = thresholds == checkpoint.get("early_stopping", {}).get(callback.state_key)
            if stopped:
                reason = f"where {callback.monitor} stopped this run early: raise the patience of EarlyStopping"
                if state["stopping_reason"] == EarlyStoppingReason.NOT_STOPPED.value:
                    state["stopping_reason"] = EarlyStoppingReason.PATIENCE_EXHAUSTED.value
                elif not patience:
                    reason = f"where {callback.monitor} stopped this run early: change the thresholds of EarlyStopping"
                self.stopped = True
            else:
                state["stopping_reason"] = EarlyStoppingReason.NOT_STOPPED.value
        step, progress = checkpoint["global_step"], checkpoint["loops"]["fit_loop"]
        epochs = progress["epoch_progress"]["current"]["processed"]
        epochs += progress["epoch_loop.batch_progress"]["is_last_batch"]
        elapsed = [s["time_elapsed"]["train"] for key, s in states.items() if key == "Timer" and "time_elapsed" in s]
        option = limit(trainer, step, epochs, elapsed[0] if elapsed else 0)
        if option:
            reason = f"where {option} ended this run: raise {option.split()[0]}"
        if reason and not resumes_unfinished(trainer):
            raise UserError(
                f"there is nothing left to train: the checkpoint is at step {step}, {reason} to train further"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = True
        trainer.should_stop = trainer.should_stop or self.stopped

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.print(f"{self.reason(trainer)} (step {trainer.global_step:,})")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.started:
            raise UserError("there is nothing to train: trainer.limit_train_batches leaves no batches; increase it")

    def reason(self, trainer: Trainer) -> str:
        """The reason why the run ended, as text."""
        if trainer.fast_dev_run:
            return "finished: trainer.fast_dev_run"
        epochs = trainer.fit_loop.epoch_progress.current.processed
        timers = [callback.time_elapsed() for callback in trainer.callbacks if isinstance(callback, Timer)]
        option = limit(trainer, trainer.global_step, epochs, timers[0] if timers else 0)
        early = [callback for callback in early_stoppings(trainer) if callback.stopping_reason.value]
        if option and not option.startswith("trainer.max_time"):
            return f"finished: reached {option}"
        for callback in early:
            return f"stopped early: {stopping_reason(callback)}"
        return f"stopped: reached {option}" if option else "stopped by a callback"


def resumes_unfinished(trainer: Trainer) -> bool:
    """Whether a run is resumed in its folder that was killed between its last step and the writing of `model/`."""
    checkpoint = trainer.ckpt_path
    return checkpoint is not None and is_unfinished(Path(trainer.default_root_dir), Path(checkpoint))


def early_stoppings(trainer: Trainer) -> list[EarlyStopping]:
    """The trainer's callbacks that may stop it early."""
    return [callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping)]


def check_after_validation(callbacks: Iterable[Callback]) -> None:
    """Makes EarlyStopping check its metric after each validation.

    By default, Lightning checks at the end of an epoch, where the metric may be missing or from an earlier validation.
    """
    for callback in callbacks:
        if isinstance(callback, EarlyStopping) and callback.monitor.startswith("val/"):
            compat.check_after_validation(callback)


def limit(trainer: Trainer, step: int, epochs: int, seconds: float) -> Optional[str]:
    """The limit that a run has reached, as an option of the trainer with its value; None if it has reached none.

    Args:
        trainer: The trainer with the options.
        step: Number of optimizer steps done.
        epochs: Number of complete epochs.
        seconds: Duration of the training so far.
    """
    if 0 < trainer.max_steps <= step:
        return f"trainer.max_steps {trainer.max_steps:,}"
    if 0 < (trainer.max_epochs or 0) <= epochs:
        return f"trainer.max_epochs {trainer.max_epochs:,}"
    for callback in trainer.callbacks:
        if isinstance(callback, Timer) and (left := callback.time_remaining()) is not None:
            duration = round(left + callback.time_elapsed(), 3)  # (time passes between the two calls)
            if seconds >= duration:
                return f"trainer.max_time {timedelta(seconds=duration)}"
    return None


def stopping_reason(callback: EarlyStopping) -> str:
    """The reason why EarlyStopping stopped the run, as text."""
    if callback.stopping_reason == EarlyStoppingReason.PATIENCE_EXHAUSTED:
        best = float(callback.best_score)
        return f"{callback.monitor} did not improve for {callback.wait_count} validations; its best was {best:.4g}"
    if callback.stopping_reason == EarlyStoppingReason.STOPPING_THRESHOLD:
        return f"{callback.monitor} has reached stopping_threshold {callback.stopping_threshold}"
    if callback.stopping_reason == EarlyStoppingReason.DIVERGENCE_THRESHOLD:
        return f"{callback.monitor} has passed divergence_threshold {callback.divergence_threshold}"
    return f"{callback.monitor} is not finite"
