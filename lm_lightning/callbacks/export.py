"""Export: leaves a folder that plain `transformers` loads, and a checkpoint of the very end."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Optional

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging

from lm_lightning import files
from lm_lightning.checkpoints.callback import Checkpoints
from lm_lightning.checkpoints.loading import load_checkpoint
from lm_lightning.errors import UserError
from lm_lightning.models.export import check_export
from lm_lightning.run import TRAINING, describe_weights

Weights = Literal["best", "last"]


class Export(Callback):
    """Writes `model/` in the run folder when training has ended, and `checkpoints/last.ckpt` of the last step.

    Args:
        weights: Whose weights `model/` gets: those of the best checkpoint, if one is monitored, or those of the last
            step. Callbacks that change the network step by step (pruning, quantization) have an attribute
            `complete_from`, the step from which it is as it will be exported; if the best checkpoint is older, the last
            step is exported.
    """

    def __init__(self, weights: Weights = "best") -> None:
        self.weights = weights

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses, before training, what could not be exported after it."""
        if trainer.fast_dev_run:
            return
        description, problem = pl_module.description(), ""
        if trainer.is_global_zero:  # as at the end; in other processes, transformers does not write all files
            with tempfile.TemporaryDirectory() as folder:
                try:
                    check_export(description, pl_module.tokenizer, Path(folder))
                except UserError as error:
                    problem = str(error)
        if problem := trainer.strategy.broadcast(problem):
            raise UserError(problem)
        place = Path(trainer.default_root_dir) / "model"
        reason = trainer.strategy.broadcast(unwritable(place) if trainer.is_global_zero else "")
        if reason:
            raise UserError(
                f"the folder {place} could not be written at the end of the run ({reason}): make it writable"
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict) -> None:
        checkpoint["export"] = {"weights": self.weights, "complete_from": complete_from(trainer)}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        run = Path(trainer.default_root_dir)
        last = run / "checkpoints" / "last.ckpt"
        trainer.strategy.checkpoint_io.teardown()  # of one that writes in the background: waits
        try:
            stale = load_checkpoint(last, weights=False, verified=True)["global_step"] != trainer.global_step
        except UserError:  # there is none, or it is damaged
            stale = True
        if trainer.strategy.broadcast(stale):  # saving is done by all processes or none
            trainer.save_checkpoint(last)
            trainer.strategy.checkpoint_io.teardown()
        saved, about = self.chosen(trainer) if trainer.is_global_zero else ({}, {})
        earlier = trainer.strategy.broadcast(saved is not None)
        export(pl_module, run / "model", about, saved if earlier else None)

    def chosen(self, trainer: Trainer) -> tuple[Optional[dict[str, Any]], dict[str, Any]]:
        """The checkpoint that is exported, None if it is the network as it is now, and what is said of it."""
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
                f"model/ gets the weights of the last step, since at the best one, {step:,}, the network was not yet "
                "pruned, quantized or averaged as it is to be exported"
            )
            return None, last
        best = {"checkpoint": "best", "step": step, "metric": monitor.monitor, "score": float(monitor.best_model_score)}
        return saved if step < trainer.global_step else None, best


def complete_from(trainer: Trainer) -> float:
    """The step from which the network is as it will be exported, see `Export`; `inf` if only at the end."""
    if any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks):
        return float("inf")
    return max([0.0, *(float(getattr(callback, "complete_from", 0)) for callback in trainer.callbacks)])


def export(
    pl_module: LightningModule, folder: Path, about: dict[str, Any], saved: Optional[dict[str, Any]] = None
) -> None:
    """Writes the model, and with an adapter `adapter/` beside it, each whole or not there; all processes call it.

    A callback with a method `on_export` may change the model's folder before it is in place.

    Args:
        pl_module: Whose network is written.
        folder: To write.
        about: What is said of the weights, in `training.json` and on the screen.
        saved: A checkpoint whose weights are written instead of the network's present ones; only the first process
            needs its content.
    """

    exporter = pl_module.exporter()

    def write(partial: Path) -> None:
        exporter.write(partial, saved)
        if pl_module.trainer.is_global_zero:
            files.write_text(partial / TRAINING, json.dumps(about, indent=2))
            for callback in pl_module.trainer.callbacks:
                if hasattr(callback, "on_export"):
                    callback.on_export(partial)

    replace(pl_module, folder, write)
    if exporter.adapter is not None:
        replace(pl_module, folder.with_name("adapter"), lambda partial: exporter.write_adapter(partial, saved))
    if pl_module.trainer.is_global_zero:
        print(f"model: {folder} (weights of the {about['checkpoint']} checkpoint, {describe_weights(about)})")


def unwritable(folder: Path) -> str:
    """Why a folder can not be written or replaced, empty if it can."""
    try:
        new = files.temporary(folder)
        new.mkdir(parents=True)
        new.rmdir()
        if folder.exists():
            new = files.temporary(folder / "config.json")
            new.touch(exist_ok=False)
            new.unlink()
    except OSError as error:
        return str(error.strerror)
    return ""


def replace(pl_module: LightningModule, folder: Path, write: Callable[[Path], None]) -> None:
    """Gives a folder its name when it is written."""
    first = pl_module.trainer.is_global_zero
    if first:
        files.remove_stale(folder.parent, folder.name)
    partial = Path(pl_module.trainer.strategy.broadcast(str(files.temporary(folder))))
    try:
        write(partial)
        if first:
            files.sync_tree(partial)
            files.put(partial, folder)
    finally:
        if first:
            files.remove(partial)
