"""Checkpoints on disk: one file, or a sharded folder, which any strategy can read."""

from pathlib import Path
from typing import Any, Optional

from lightning.fabric.plugins import TorchCheckpointIO

from lm_lightning.run import load_checkpoint


class Checkpoints(TorchCheckpointIO):
    """Lightning's files, and sharded folders, of which strategies that do not shard get whole tensors."""

    def load_checkpoint(
        self, path: str | Path, map_location: Optional[Any] = None, weights_only: Optional[bool] = None
    ) -> dict[str, Any]:
        return load_checkpoint(Path(path))
