"""Export: leaves a folder that plain `transformers` loads, and a checkpoint of the very end."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from lm_lightning.run import load_checkpoint


class Export(Callback):
    """Writes `model/` in the run folder when training has ended, and `checkpoints/last.ckpt` to go on from there."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        run = Path(trainer.default_root_dir)
        last = run / "checkpoints" / "last.ckpt"
        stale = not last.exists() or load_checkpoint(last, weights=False)["global_step"] != trainer.global_step
        if trainer.strategy.broadcast(stale):  # saving is done by all processes or none
            trainer.save_checkpoint(last)
        pl_module.export(run / "model")
        if trainer.is_global_zero:
            print(f"model: {run / 'model'}")
