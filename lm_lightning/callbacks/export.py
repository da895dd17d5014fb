"""At the end of training, writes a folder that plain `transformers` can load, and a checkpoint of the last step."""

import tempfile
from pathlib import Path
from typing import Any, Literal, Optional

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging

from lm_lightning import files
from lm_lightning.checkpoints.callback import Checkpoints
from lm_lightning.checkpoints.loading import load_checkpoint
from lm_lightning.errors import UserError
from lm_lightning.models.export import Changes, ChangesExport, changes_of, check_export
from lm_lightning.run import describe_weights

Weights = Literal["best", "last"]


class Export(Callback):
    """Writes `model/` in the run folder, and `checkpoints/last.ckpt` of the last step, at the end of training.

    Args:
        weights: Weights that are written to `model/`: those of the best checkpoint, if a metric is monitored, or those
            of the last step. Callbacks that change the network gradually (pruning, quantization) have an attribute
            `complete_from`, the step from which the network has its final form; if the best checkpoint is older, the
            last step is exported.
    """

    def __init__(self, weights: Weights = "best") -> None:
        self.weights = weights

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks before training that the network can be exported after it."""
        if trainer.fast_dev_run:
            return
        description, problem = pl_module.description(), ""
        if trainer.is_global_zero:  # transformers writes all files in the first process only
            with tempfile.TemporaryDirectory() as folder:
                try:
                    check_export(description, pl_module.tokenizer, Path(folder))
                except UserError as error:
                    problem = str(error)
        if problem := trainer.strategy.broadcast(problem):
            raise UserError(problem)
        place = Path(trainer.default_root_dir) / "model"
        reason = trainer.strategy.broadcast(files.unwritable(place) if trainer.is_global_zero else "")
        if reason:
            raise UserError(
                f"the folder {place}, which is written at the end of the run, is not writable ({reason}): make it "
                "writable"
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict) -> None:
        checkpoint["export"] = {"weights": self.weights, "complete_from": complete_from(trainer)}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        run = Path(trainer.default_root_dir)
        last = run / "checkpoints" / "last.ckpt"
        trainer.strategy.checkpoint_io.teardown()  # waits for pending writes in the background
        try:
            stale = load_checkpoint(last, weights=False, verified=True)["global_step"] != trainer.global_step
        except UserError:  # it is missing or damaged
            stale = True
        if trainer.strategy.broadcast(stale):  # all processes save together
            trainer.save_checkpoint(last)
            trainer.strategy.checkpoint_io.teardown()
        saved, about = self.chosen(trainer) if trainer.is_global_zero else ({}, {})
        earlier = trainer.strategy.broadcast(saved is not None)
        export(pl_module, run / "model", about, saved if earlier else None)

    def chosen(self, trainer: Trainer) -> tuple[Optional[dict[str, Any]], dict[str, Any]]:
        """The checkpoint to export, or None to export the current network; and its name, step and score."""
        last = {"checkpoint": "last", "step": trainer.global_step}
        monitors = [c for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoints) and c.has_best()]
        if not monitors or self.weights == "last":
            return None, last
        monitor = monitors[0]
        try:
            saved = load_checkpoint(Path(monitor.best_model_path), verified=True)
        except UserError as error:
            print(f"model/ gets the weights of the last step instead of the best one: {error}")
            return None, last
        step = saved["global_step"]
        if step < complete_from(trainer):
            print(
                f"model/ gets the weights of the last step: at the step of the best checkpoint, {step:,}, the network "
                "was not yet completely pruned, quantized or averaged"
            )
            return None, last
        best = {"checkpoint": "best", "step": step, "metric": monitor.monitor, "score": float(monitor.best_model_score)}
        return saved if step < trainer.global_step else None, best


def complete_from(trainer: Trainer) -> float:
    """The step from which the network has its final form, see `Export`; `inf` if it has it only at the end."""
    if any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks):
        return float("inf")
    return max([0.0, *(float(getattr(callback, "complete_from", 0)) for callback in trainer.callbacks)])


def export(
    pl_module: LightningModule, folder: Path, about: dict[str, Any], saved: Optional[dict[str, Any]] = None
) -> None:
    """Writes the model, and the files of an adapter to `adapter/` beside it; all processes call it.

    Args:
        pl_module: Module with the network to write.
        folder: Folder to write.
        about: Checkpoint, step and score of the weights.
        saved: A checkpoint whose weights are written instead of the network's current ones; only the first process
            needs its content.
    """
    changes: Changes
    if saved is None:
        own = [callback for callback in pl_module.trainer.callbacks if isinstance(callback, ChangesExport)]
        changes = [(type(callback), callback.state_dict()) for callback in own]  # all processes, as some sum over them
    else:
        changes = changes_of(saved)
    model = pl_module.exporter().model(saved)
    if model is None:  # in other processes
        return
    model.write(folder, about, changes, folder.with_name("adapter"))
    print(f"model: {folder} (weights of the {about['checkpoint']} checkpoint, {describe_weights(about)})")
