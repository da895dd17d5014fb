"""Lightning plugins that read and write checkpoints: `CheckpointFiles`, and `BackgroundCheckpoints` in a thread."""

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
    """Lightning's CheckpointIO with atomic writes: files are complete or absent even if a process or machine dies."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        files.save(checkpoint, Path(path))

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Loads a checkpoint. The best checkpoints that it names are looked up in its folder."""
        path = Path(path)
        # (The file may not be a checkpoint: ddp_spawn returns the weights in a file.)
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

    The state is first copied to host memory. The run waits for the last write before it ends, and fails if a write
    fails. (Lightning's AsyncCheckpointIO copies on the device, copies shared tensors twice, queues any number of
    copies, and removes an old checkpoint before the new one is written.)
    """

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.pending: list[Future] = []

    def submit(self, *call: Any) -> None:
        self.wait(1)  # at most two, as `best` and `last` are often saved together
        self.pending.append(self.thread.submit(*call))

    def wait(self, left: int = 0) -> None:
        """Waits until at most `left` writes and removals are pending, and raises the error of any that failed."""
        while len(self.pending) > left or (self.pending and self.pending[0].done()):
            self.pending.pop(0).result()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        copies: dict[tuple, Tensor] = {}  # tensors that share memory also share it in the file

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
        self.submit(super().remove_checkpoint, path)  # after the checkpoints that replace it are written

    def teardown(self) -> None:
        self.wait()


def relocate_best_paths(state: dict[str, Any], folder: str) -> None:
    """Replaces the paths in the state of a ModelCheckpoint by paths in `folder`, if all of its files were moved there.

    Other paths are dropped from the state, as ModelCheckpoint removes files that are no longer among the best.
    """
    if state["dirpath"] == folder:
        best = state["best_k_models"]
        state["best_k_models"] = {path: best[path] for path in best if os.path.dirname(path) == folder}
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[key] = state[key] if os.path.dirname(state[key]) == folder else ""
        return
    here = {path: os.path.join(folder, os.path.basename(path)) for path in state["best_k_models"]}
    if not all(map(os.path.isfile, here.values())):
        return  # only this checkpoint was copied
    state["best_k_models"] = {here[path]: score for path, score in state["best_k_models"].items()}
    for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
        if os.path.dirname(state[key]) == state["dirpath"]:
            state[key] = os.path.join(folder, os.path.basename(state[key]))
    state["dirpath"] = folder
