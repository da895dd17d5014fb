"""Resuming: makes a checkpoint from anywhere in the loops one that lies between two optimizer steps."""

from typing import Optional

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.evaluation_loop import RestartStage


class Resuming(Callback):
    """Takes care that the run which goes on from a checkpoint does and logs what this one would have.

    Lightning restarts amid an optimizer step or a validation, wherever the checkpoint was made, with what is left of
    it: a step of fewer samples, a metric of some of the data. Here the step begins anew, and the validation.
    """

    def __init__(self) -> None:
        self.validated: Optional[int] = None  # step of the last finished validation
        self.accumulated: Optional[int] = None  # micro-batches in an optimizer step of the checkpoint

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validated = trainer.global_step

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict) -> None:
        for logger in trainer.loggers:
            logger.save()  # who goes on does not log these steps again
        # The next step's first batches may be counted already; who goes on reads them again.
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        begun = progress["current"]["processed"] % trainer.accumulate_grad_batches
        for counts in (progress["current"], progress["total"]):
            counts |= dict.fromkeys(counts, counts["processed"] - begun)
        progress["is_last_batch"] = progress["current"]["processed"] == trainer.num_training_batches

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        now = trainer.accumulate_grad_batches
        if self.accumulated not in (None, now):  # Lightning counts micro-batches, of which there are others now
            counts = trainer.fit_loop.epoch_loop.batch_progress.current
            for name in ("ready", "started", "processed", "completed"):
                setattr(counts, name, getattr(counts, name) // self.accumulated * now)
        self.accumulated = now
        if trainer.global_step == pl_module.resumed_at != self.validated:
            # If a validation is due at this step, it was not finished. Lightning would take it for done.
            validation = trainer.fit_loop.epoch_loop.val_loop
            validation.batch_progress.reset_on_run()
            validation._restart_stage = RestartStage.RESTARTED_MID_EVALUATION

    def state_dict(self) -> dict:
        return {"validated": self.validated, "accumulated": self.accumulated}

    def load_state_dict(self, state: dict) -> None:
        self.validated, self.accumulated = state["validated"], state["accumulated"]
