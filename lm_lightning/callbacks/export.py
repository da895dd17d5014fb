"""Export: leaves a folder that plain `transformers` loads, and a checkpoint of the very end."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer


class Export(Callback):
    """Writes `model/` in the run folder when training has ended, and `checkpoints/last.ckpt` to go on from there."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run = Path(trainer.default_root_dir)
        trainer.save_checkpoint(run / "checkpoints" / "last.ckpt")
        if trainer.is_global_zero:
            pl_module.export(run / "model")
