"""Export: leaves a folder that plain `transformers` loads, and a checkpoint of the very end."""

import shutil
from collections.abc import Callable
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from lm_lightning.errors import UserError
from lm_lightning.run import load_checkpoint


class Export(Callback):
    """Writes `model/` in the run folder when training has ended, and `checkpoints/last.ckpt` to go on from there."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        run = Path(trainer.default_root_dir)
        last = run / "checkpoints" / "last.ckpt"
        trainer.strategy.checkpoint_io.teardown()  # of one that writes in the background: waits
        try:
            stale = load_checkpoint(last, weights=False, checked=True)["global_step"] != trainer.global_step
        except UserError:  # there is none, or it is damaged
            stale = True
        if trainer.strategy.broadcast(stale):  # saving is done by all processes or none
            trainer.save_checkpoint(last)
        export(pl_module, run / "model")


def export(pl_module: LightningModule, folder: Path) -> None:
    """Writes the model, and of LoRA `adapter/` beside it, each whole or not there; all processes call it.

    A callback with a method `on_export` may change the model's folder before it is in place.
    """

    def write(partial: Path) -> None:
        pl_module.export(partial)
        for callback in pl_module.trainer.callbacks:
            if hasattr(callback, "on_export") and pl_module.trainer.is_global_zero:
                callback.on_export(partial)

    replace(pl_module, folder, write)
    if pl_module.lora is not None:
        replace(pl_module, folder.with_name("adapter"), pl_module.export_adapter)
    if pl_module.trainer.is_global_zero:
        print(f"model: {folder}")


def replace(pl_module: LightningModule, folder: Path, write: Callable[[Path], None]) -> None:
    """Gives a folder its name when it is written."""
    partial = folder.with_suffix(".partial")
    if pl_module.trainer.is_global_zero:
        shutil.rmtree(partial, ignore_errors=True)
    write(partial)
    if pl_module.trainer.is_global_zero:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
