"""Checkpoint files: saves a dict of tensors and plain values atomically, so that a file is complete or absent."""

import io
import os
import shutil
from pathlib import Path
from typing import Any, Optional

import torch

from lm_lightning.errors import UserError
from lm_lightning.files import PARTIAL, remove, replacing

OLD = ".old"  # suffix of a sharded checkpoint while another one replaces it


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint under a temporary name, flushes it to disk, checks that it can be loaded, and renames it.

    Whenever a process or machine dies, `path` is either the complete old file or the complete new file.

    Raises:
        UserError: If the disk is full, or the checkpoint contains something that could not be loaded again. The old
            file is kept, and the incomplete new file is removed.
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
    """Removes unfinished checkpoints of killed processes from a folder."""
    for partial in folder.glob(f"*{PARTIAL}"):
        remove(partial)


class CountingWriter:
    """A file for `torch.save` that keeps counting when the disk is full, so that the size of the checkpoint is known.

    Attributes:
        size: Number of bytes so far, written or not.
        error: The error of the first write that failed; None if none failed.
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
        """Does nothing, as `save` flushes the file itself."""


def write_error(path: Path, error: OSError, size: str) -> UserError:
    """The error for a checkpoint that could not be written. Create it after the incomplete file is removed.

    Args:
        path: The checkpoint.
        error: Why it could not be written.
        size: Number of bytes that it needs, for the message.
    """
    return UserError(
        f"the checkpoint {path} cannot be written ({error.strerror}): it needs {size} bytes, and "
        f"{shutil.disk_usage(path.parent).free:,} are free: free some disk space and resume with --ckpt_path last"
    )


def check_loads(written: Path, path: Path) -> None:
    """Checks that a file can be loaded without running code, before it is renamed to `path`.

    Raises:
        UserError: If it cannot; names the class of the object that cannot be loaded.
    """
    try:
        torch.load(written, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load raises any type of error, as objects may do when they are loaded
        classes = torch.serialization.get_unsafe_globals_in_checkpoint(written)
        raise UserError(
            f"the checkpoint {path} could not be loaded again: the state of a callback or module contains "
            f"{'a ' + classes[0] if classes else 'an object'}, but only tensors, numbers, strings, lists and dicts "
            "are safe to load: change its state_dict()"
        ) from error
