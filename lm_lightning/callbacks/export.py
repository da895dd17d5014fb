"""Export: leaves a folder that plain `transformers` loads, and a checkpoint of the very end."""

from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


def load(checkpoint: Path) -> dict:
    """A checkpoint, its tensors left on disk until they are used."""
    return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)


class Export(Callback):
    """Writes `model/` in the run folder when training has ended, and `checkpoints/last.ckpt` to go on from there."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run = Path(trainer.default_root_dir)
        last = run / "checkpoints" / "last.ckpt"
        if not last.exists() or load(last)["global_step"] != trainer.global_step:
            trainer.save_checkpoint(last)
        if trainer.is_global_zero:
            pl_module.export(run / "model")
            print(f"model: {run / 'model'}")
