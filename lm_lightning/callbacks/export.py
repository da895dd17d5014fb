"""Export: leaves a folder that plain `transformers` loads, and a checkpoint of the very end."""

import shutil
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
    """Writes the model, so that the folder is whole or not there; all processes call it.

    A callback with a method `on_export` may change the folder before it is in place.
    """
    partial = folder.with_suffix(".partial")
    if pl_module.trainer.is_global_zero:
        shutil.rmtree(partial, ignore_errors=True)
    pl_module.export(partial)
    if pl_module.trainer.is_global_zero:
        for callback in pl_module.trainer.callbacks:
            if hasattr(callback, "on_export"):
                callback.on_export(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        print(f"model: {folder}")
