"""What Lightning writes and reads checkpoints with: `CheckpointFiles`, and `BackgroundCheckpoints` in a thread."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lm_lightning.checkpoints import files
from lm_lightning.checkpoints.loading import load_checkpoint


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's CheckpointIO with files that are complete or absent, whenever a process or machine dies."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        files.save(checkpoint, Path(path))

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Loads a checkpoint; the best checkpoints that it names are looked for beside it."""
        path = Path(path)
        # (a file may be something else: ddp_spawn returns the weights in one)
        checkpoint = (
            load_checkpoint(path, verified=True) if path.is_dir() else super().load_checkpoint(path, *args, **kwargs)
        )
        folder = os.path.realpath(path.parent)
        for state in checkpoint.get("callbacks", {}).values():
            if isinstance(state, dict) and {"dirpath", "best_k_models"} <= state.keys():
                relocate_best_paths(state, folder)
        return checkpoint


class BackgroundCheckpoints(CheckpointFiles):
    """Writes checkpoints in a thread while training continues: `--trainer.plugins BackgroundCheckpoints`.

    The state is first copied to host memory. The run ends when everything is written; an error of the thread ends it.
    (Lightning's AsyncCheckpointIO copies on the device, copies shared tensors twice, queues any number of copies, and
    removes an old checkpoint before the new one is written.)
    """

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.pending: list[Future] = []

    def submit(self, *call: Any) -> None:
        self.wait(1)  # two at most: those of `best` and `last` come together
        self.pending.append(self.thread.submit(*call))

    def wait(self, left: int = 0) -> None:
        """Waits until at most `left` files are to be written or removed, and raises the error of those that failed."""
        while len(self.pending) > left or (self.pending and self.pending[0].done()):
            self.pending.pop(0).result()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        copies: dict[tuple, Tensor] = {}  # tensors that share memory share it in the file, too

        def copied(tensor: Tensor) -> Tensor:
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if key not in copies:
                copies[key] = tensor.detach().to("cpu", copy=True)
            return copies[key]

        self.submit(super().save_checkpoint, apply_to_collection(checkpoint, Tensor, copied), path)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.wait()
        return super().load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: str | Path) -> None:
        self.submit(super().remove_checkpoint, path)  # after those that replace it

    def teardown(self) -> None:
        self.wait()


def relocate_best_paths(state: dict[str, Any], folder: str) -> None:
    """Changes the state of a ModelCheckpoint to paths in `folder`, if all files that it names were moved there.

    Files elsewhere are forgotten: ModelCheckpoint removes those that are no longer among the best.
    """
    if state["dirpath"] == folder:
        best = state["best_k_models"]
        state["best_k_models"] = {path: best[path] for path in best if os.path.dirname(path) == folder}
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[key] = state[key] if os.path.dirname(state[key]) == folder else ""
        return
    here = {path: os.path.join(folder, os.path.basename(path)) for path in state["best_k_models"]}
    if not all(map(os.path.isfile, here.values())):
        return  # it alone was copied
    state["best_k_models"] = {here[path]: score for path, score in state["best_k_models"].items()}
    for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
        if os.path.dirname(state[key]) == state["dirpath"]:
            state[key] = os.path.join(folder, os.path.basename(state[key]))
    state["dirpath"] = folder
