"""Lightning's training loop, extended so that the last step of a run is always validated."""

from lightning.pytorch import Trainer

from lm_lightning.callbacks.ending import resumes_unfinished
from lm_lightning.callbacks.resuming import Resuming
from lm_lightning.compat.lightning import LightningFitLoop


class FitLoop(LightningFitLoop):
    """Lightning's loop over the epochs, which validates the last step of training unless it was already validated.

    A run that is resumed at its last step, because it was killed during that validation or before `model/` was
    written, does only what is missing.
    """

    @classmethod
    def replace(cls, trainer: Trainer) -> None:
        """Makes a trainer use this loop."""
        old = trainer.fit_loop
        trainer.fit_loop = cls(trainer, old.min_epochs, old.max_epochs)
        trainer.fit_loop.epoch_loop = old.epoch_loop

    @property
    def skip(self) -> bool:
        return super().skip and not resumes_unfinished(self.trainer)

    def on_iteration_done(self) -> None:
        super().on_iteration_done()
        self.epoch_loop.restarting = False  # Lightning does not reset it if the epoch was complete

    def on_run_end(self) -> None:
        trainer, validation = self.trainer, self.epoch_loop.val_loop
        validated = [callback.validated for callback in trainer.callbacks if isinstance(callback, Resuming)]
        if trainer.enable_validation and trainer.global_step > 0 and trainer.global_step not in validated:
            validation.restarting = False
            trainer.validating = True
            validation.run()
            trainer.training = True
        super().on_run_end()
