"""Files and folders that are complete or absent: written beside their place under a temporary name, then renamed.

A temporary file is created exclusively, so that it is never somebody's link to elsewhere, and has a name that no other
process or host uses.
"""

import contextlib
import glob
import os
import secrets
import shutil
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

PARTIAL = ".partial"  # ends the name of a file or folder that is being written


def temporary(path: Path) -> Path:
    """A name beside `path` that no other process uses."""
    host = "".join(c if c.isalnum() else "-" for c in socket.gethostname())
    return path.with_name(f"{path.name}.{host}-{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")


@contextlib.contextmanager
def replacing(path: Path, mode: str = "w", **settings: Any) -> Iterator[IO]:
    """Opens a new file that takes the place of `path` when the block ends without an error.

    Args:
        path: File to replace or to make; if it is a link, the link is replaced, not what it leads to.
        mode: `w` for UTF-8 text, `wb` for bytes.
        settings: Others of `open`.
    """
    partial = temporary(path)
    encoding = {} if "b" in mode else {"encoding": "utf-8"}
    try:
        with open(partial, mode.replace("w", "x"), **(encoding | settings)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replaces a file by a text in UTF-8; what UTF-8 cannot express is escaped."""
    with replacing(path, errors="backslashreplace") as file:
        file.write(text)


@contextlib.contextmanager
def new_folder(folder: Path, locked: bool) -> Iterator[Path]:
    """Gives a folder to write into, which becomes `folder` when the block ends without an error.

    If another process was faster, its folder stays and this one is removed.

    Args:
        folder: Must not exist.
        locked: Whether no other process can be writing the same folder now; what killed ones have left is removed.
    """
    if locked:
        for stale in folder.parent.glob(f"{glob.escape(folder.name)}.*{PARTIAL}"):
            remove(stale)
    partial = temporary(folder)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        sync(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        remove(partial)
    sync(folder.parent)


def remove(path: Path) -> None:
    """Removes a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """Makes sure that a folder's list of names is on the disk."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with open(path, "rb") as stream:
        while part := stream.read(1 << 24):
            value = zlib.crc32(part, value)
    return value
