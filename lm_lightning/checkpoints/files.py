"""Checkpoint files: a dict of tensors and plain values in, a file that is complete or absent out."""

import io
import os
import shutil
from pathlib import Path
from typing import Any, Optional

import torch

from lm_lightning.errors import UserError
from lm_lightning.files import PARTIAL, remove, replacing

OLD = ".old"  # ends the name of a sharded checkpoint while another takes its place


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint under a temporary name, makes sure that it is on the disk and loads, and renames it.

    If a process or machine dies at any moment, `path` is the old or the new file, complete.

    Raises:
        UserError: If there is no room for it, or it holds something that could not be loaded again. The earlier file of
            that name stays, and no part of the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_partial(path.parent)
    with replacing(path, "wb", path.with_name(path.name + OLD), buffering=0) as file:
        writer = CountingWriter(file)  # type: ignore[arg-type] # without a buffer
        torch.save(checkpoint, writer)  # type: ignore[arg-type] # it needs no more of a file
        try:
            if writer.error is not None:
                raise writer.error
            os.fsync(file.fileno())
        except OSError as error:
            file.truncate(0)  # its own part counts as free
            raise write_error(path, error, f"{writer.size:,}") from error
        check_loads(Path(file.name), path)


def remove_partial(folder: Path) -> None:
    """Removes the unfinished checkpoints that killed processes have left in a folder."""
    for partial in folder.glob(f"*{PARTIAL}"):
        remove(partial)


class CountingWriter:
    """A file for `torch.save` that keeps counting when the disk is full, so that the size of the checkpoint is known.

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
        """`save` flushes the file itself."""


def write_error(path: Path, error: OSError, size: str) -> UserError:
    """The error for a checkpoint that could not be written, with its size in bytes; to be raised when it is removed."""
    return UserError(
        f"the checkpoint {path} cannot be written ({error.strerror}): it needs {size} bytes, and "
        f"{shutil.disk_usage(path.parent).free:,} are free: make room and resume with --ckpt_path last"
    )


def check_loads(written: Path, path: Path) -> None:
    """Checks, before a file gets its name `path`, that it can be loaded without running code.

    Raises:
        UserError: Names the class that cannot.
    """
    try:
        torch.load(written, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        classes = torch.serialization.get_unsafe_globals_in_checkpoint(written)
        raise UserError(
            f"the checkpoint {path} could not be loaded again: the state of a callback or module holds "
            f"{'a ' + classes[0] if classes else 'something'}, but only tensors, numbers, strings, lists and dicts "
            "are safe to load: change its state_dict"
        ) from error
