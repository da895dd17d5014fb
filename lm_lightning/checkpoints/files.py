"""Checkpoints: the state of a run in, a file out that is whole or is not there.

`CheckpointFiles` writes and reads them, `BackgroundCheckpoints` does so beside the training, `Checkpoints` says when.
"""

import io
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Optional

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lm_lightning.errors import UserError
from lm_lightning.files import PARTIAL, remove, replacing
from lm_lightning.run import OLD, load_checkpoint


class CheckpointFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its place, makes sure that it is on the disk and can be loaded, and moves it there.

    Whenever a process or machine dies, the file of that name is the old or the new one, whole.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes a checkpoint.

        Raises:
            UserError: If there is no room for it, or it holds something that could not be loaded again. The earlier
                file of that name stays, and no part of the new one.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f"*{PARTIAL}"):  # a killed process has left it
            remove(stale)
        with replacing(path, "wb", path.with_name(path.name + OLD), buffering=0) as file:
            writer = Writer(file)  # type: ignore[arg-type] # without a buffer
            torch.save(checkpoint, writer)  # type: ignore[arg-type] # it needs no more of a file
            try:
                if writer.error is not None:
                    raise writer.error
                os.fsync(file.fileno())
            except OSError as error:
                file.truncate(0)  # its own part counts as free
                raise unwritten(path, error, f"{writer.size:,}") from error
            check_loads(Path(file.name), path)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Loads a checkpoint; where it lies now is where those lie that it names as the best."""
        path = Path(path)
        # (a file may be another thing: ddp_spawn brings the weights home in one)
        checkpoint = (
            load_checkpoint(path, checked=True) if path.is_dir() else super().load_checkpoint(path, *args, **kwargs)
        )
        folder = os.path.realpath(Path(path).parent)
        for state in checkpoint.get("callbacks", {}).values():
            if isinstance(state, dict) and {"dirpath", "best_k_models"} <= state.keys():
                moved(state, folder)
        return checkpoint


class Writer:
    """A file for `torch.save`, which counts on when the disk is full, so that we know how much room was needed.

    Attributes:
        size: Bytes so far, written or not.
        error: Why they are not.
    """

    def __init__(self, file: io.FileIO) -> None:
        self.file, self.size = file, 0
        self.error: Optional[OSError] = None

    def write(self, data: Any) -> int:  # noqa: D102 (as a file's)
        rest = memoryview(data)
        self.size += rest.nbytes
        try:
            while rest and self.error is None:
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            self.error = error
        return len(data)

    def flush(self) -> None:
        """`CheckpointFiles` does."""


class BackgroundCheckpoints(CheckpointFiles):
    """Writes checkpoints in a thread, while training goes on: `--trainer.plugins BackgroundCheckpoints`.

    The state is first copied to host memory. The run ends when all is written; what goes wrong ends it. (Lightning's
    AsyncCheckpointIO copies on the device, shared tensors twice, queues as many copies as come, and removes an old
    checkpoint before the new one is written.)
    """

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.pending: list[Future] = []

    def submit(self, *call: Any) -> None:
        self.wait(1)  # two at most: those of `best` and `last` come together
        self.pending.append(self.thread.submit(*call))

    def wait(self, left: int = 0) -> None:
        """Waits until no more than `left` files are to be written or removed, and raises what went wrong."""
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


class Checkpoints(ModelCheckpoint):
    """Lightning's ModelCheckpoint, whose files can be gone on from exactly, with scores of the very step they hold.

    It saves between optimizer steps only, when the last one has been logged, and never takes what is not a number for
    the best.

    Args:
        filename: Name of the files, without `.ckpt`. Where several are kept (`save_top_k` is not 1), each needs a name
            of its own, so `-{step}` and the score are added unless the name has `{step}` in it.
        monitor: Metric that tells how good a checkpoint is, such as `val/loss`. Default of `best`: the main metric of
            the model and its data, such as `val/accuracy`; of `last`: none, and the newest checkpoint is kept.
        save_top_k: How many of the best are kept, -1 for all, 0 for none.
        mode: Whether a small value of the metric is good, `min`, or a large one, `max`. Default: what is right for the
            metric.
        options: Those of Lightning's ModelCheckpoint.
    """

    validated = -1  # the step of the last validation
    option = "checkpoints"  # its name on the command line

    def __init__(
        self,
        filename: Optional[str] = None,
        monitor: Optional[str] = None,
        save_top_k: int = 1,
        mode: Optional[Literal["min", "max"]] = None,
        **options: Any,
    ) -> None:
        if save_top_k not in (0, 1) and filename and "{step" not in filename:
            score = f"-{{{monitor}:.4f}}" if monitor and "{" not in filename else ""
            filename += "-{step}" + score
        super().__init__(filename=filename, monitor=monitor, save_top_k=save_top_k, mode=mode or "min", **options)
        self.given_mode = mode

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        worst_first = sorted(self.best_k_models, key=lambda path: self.best_k_models[path], reverse=self.mode == "min")
        for path in worst_first[: -self.save_top_k] if self.save_top_k > 0 else ():  # the resumed run kept more of them
            del self.best_k_models[path]
            trainer.strategy.remove_checkpoint(path)
        if self.best_k_models:
            self.kth_best_model_path = next(path for path in worst_first if path in self.best_k_models)
            self.kth_value = self.best_k_models[self.kth_best_model_path]

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Lightning saves here, before the step is logged, and amid accumulation."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any = None, batch_idx: int = 0
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0 and trainer.global_step > pl_module.resumed_at:
            super().on_train_batch_end(trainer, pl_module, None, batch, batch_idx)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        # A validation may take long. But the last step is saved when all is done: nothing goes on from there.
        if self.monitor is not None or trainer.global_step < pl_module.total_steps():
            self.on_train_batch_start(trainer, pl_module)

    def has_best(self) -> bool:
        """Whether one of its files is the best of this run."""
        here = os.path.dirname(self.best_model_path) == str(self.dirpath)
        return self.monitor is not None and self.best_model_score is not None and here

    def _should_save_on_train_epoch_end(self, trainer: Trainer) -> bool:
        # Lightning would save at the end of each epoch even if it is validated, too early for the last validation.
        if self._save_on_train_epoch_end is None and sum(trainer.num_val_batches):
            return False
        return super()._should_save_on_train_epoch_end(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validated = trainer.global_step
        super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_batch_start(trainer, pl_module)
        super().on_train_end(trainer, pl_module)

    def _monitor_candidates(self, trainer: Trainer) -> dict[str, Tensor]:
        # Lightning keeps the metrics of a validation for the steps after it.
        metrics = super()._monitor_candidates(trainer)
        if self.validated != trainer.global_step:
            metrics |= {name: torch.tensor(float("nan")) for name in metrics if name.startswith("val/")}
            if str(self.monitor).startswith("val/"):
                metrics.pop(self.monitor, None)  # so it waits for the next validation
        return metrics

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        # Lightning fails here if an epoch or the run ends at a step that was not validated.
        if self.monitor is None or self.monitor in monitor_candidates:
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def check_monitor_top_k(self, trainer: Trainer, current: Optional[Tensor] = None) -> bool:
        """Whether a score is one of the best; one that is not finite never is."""
        return current is not None and bool(current.isfinite()) and super().check_monitor_top_k(trainer, current)


def moved(state: dict[str, Any], folder: str) -> None:
    """Makes the state of a ModelCheckpoint that of `folder`, if all that it names has been moved there.

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


def unwritten(path: Path, error: OSError, size: str) -> UserError:
    """Why a checkpoint, of a number of bytes, could not be written; its parts are removed."""
    return UserError(
        f"the checkpoint {path} cannot be written ({error.strerror}): it needs {size} bytes, of which "
        f"{shutil.disk_usage(path.parent).free:,} are free: make room and go on with --ckpt_path last"
    )


def check_loads(written: Path, path: Path) -> None:
    """Refuses a file that could not be loaded again, before it has its place at `path`."""
    try:
        torch.load(written, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        kind = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(
            f"the checkpoint {path} could not be loaded again: the state of a callback or module holds "
            f"{'a ' + kind[1] if kind else 'something'}, but only tensors, numbers, strings, lists and dicts "
            "are safe to load: change its state_dict"
        ) from error
