"""Makes each checkpoint represent a state between two optimizer steps, and resumes exactly there."""

from typing import Any, Optional

from lightning.pytorch import Callback, LightningModule, Trainer

from lm_lightning.compat import lightning as compat
from lm_lightning.data import contract


class Resuming(Callback):
    """Makes a resumed run do and log exactly what the interrupted run would have done.

    Lightning saves the counters of its loops as they are at that moment, which may be in the middle of an optimizer
    step, of a validation or of the end of an epoch. How it resumes depends on that: it may skip a step or an epoch, or
    train one batch too many. With this callback, a checkpoint always has the number of complete epochs, the number of
    batches of complete optimizer steps in the next epoch, and whether the last step was validated.
    """

    def __init__(self) -> None:
        self.validated: Optional[int] = None  # step of the last finished validation
        self.accumulated: Optional[int] = None  # micro-batches per optimizer step when the checkpoint was saved
        self.batch_samples: Optional[int] = None  # samples per micro-batch of all replicas at that time

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validated = trainer.global_step

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict) -> None:
        for logger in trainer.loggers:
            logger.save()  # since a resumed run does not log these steps again
        loops = checkpoint["loops"]["fit_loop"]
        epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
        length, done = trainer.num_training_batches, batches["current"]["processed"]
        # Batches of an incomplete step are read again. (The last step of an epoch may have fewer of them.)
        begun = 0 if done == length else done % trainer.accumulate_grad_batches
        done -= begun
        # `processed` is increased before the hooks at the end of an epoch, even if trainer.max_steps ends it early.
        ended = epochs["current"]["processed"] == epochs["current"]["ready"] and (done in (0, length))
        complete = epochs["current"]["ready"] - (0 if ended else 1)
        if ended:
            done = 0
        for counts in (epochs["current"], epochs["total"]):
            counts |= dict.fromkeys(("processed", "completed"), complete)
            counts |= dict.fromkeys(("ready", "started"), complete + (1 if done else 0))
        batches["total"] |= dict.fromkeys(batches["total"], batches["total"]["processed"] - begun)
        batches["current"] |= dict.fromkeys(batches["current"], done)
        batches["is_last_batch"] = done == length

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loop = trainer.fit_loop.epoch_loop
        self.convert(trainer)
        if trainer.global_step != pl_module.resumed_at or trainer.global_step == 0:
            return
        begun = loop.batch_progress.current.ready > 0
        due = begun and compat.validation_is_due(trainer)
        if due and self.validated != trainer.global_step:
            compat.repeat_validation(trainer)
        elif loop.batch_progress.is_last_batch:
            compat.mark_epoch_validated(trainer)

    def convert(self, trainer: Trainer) -> None:
        """Converts the counters of a run that had another batch size or number of micro-batches per step.

        The position in the data does not depend on these, since it is a number of samples.
        """
        progress, length = trainer.fit_loop.epoch_loop.batch_progress, int(trainer.num_training_batches)
        accumulate = trainer.accumulate_grad_batches
        replicas = contract.place(trainer)["num_replicas"]
        batch_size = contract.optional(trainer.datamodule, "batch_size")
        samples = replicas * batch_size if isinstance(batch_size, int) else self.batch_samples or replicas
        done = progress.current.ready
        if (self.accumulated, self.batch_samples) != (accumulate, samples):
            done = done * (self.batch_samples or samples) // samples // accumulate * accumulate
        if self.accumulated not in (None, accumulate):
            total = progress.total.ready // self.accumulated * accumulate  # the number of steps stays the same
            for name in ("ready", "started", "processed", "completed"):
                setattr(progress.total, name, total)
        done = length if progress.is_last_batch else min(done, length)
        for name in ("ready", "started", "processed", "completed"):
            setattr(progress.current, name, done)
        progress.is_last_batch = done == length
        self.accumulated, self.batch_samples = accumulate, samples

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        compat.set_logged_steps(trainer, trainer.global_step)

    def state_dict(self) -> dict:
        return {"validated": self.validated, "accumulated": self.accumulated, "batch_samples": self.batch_samples}

    def load_state_dict(self, state: dict) -> None:
        self.validated, self.accumulated = state["validated"], state["accumulated"]
        self.batch_samples = state.get("batch_samples")
