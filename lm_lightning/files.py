"""Files and folders that are complete or absent: written under a temporary name in the same folder, then renamed.

A temporary file is created exclusively, so that it is never somebody's link to another file, and has a name that no
other process or host uses.
"""

import contextlib
import glob
import io
import os
import re
import secrets
import shutil
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Optional

from lm_lightning.console import printable
from lm_lightning.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTIAL = ".partial"  # ends the name of a file or folder that is being written


def temporary(path: Path) -> Path:
    """A name beside `path` that no other process uses."""
    return path.with_name(f"{path.name}.{host()}-{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")


def host() -> str:
    """The name of this machine, as it appears in the names of temporary files."""
    return "".join(c if c.isalnum() else "-" for c in socket.gethostname())


def remove_stale(folder: Path, name: str = "*") -> None:
    """Removes the unfinished files of processes of this machine that have ended, such as killed ones.

    Args:
        folder: Folder that directly contains them; subfolders are not searched.
        name: Pattern of the names of the finished files.
    """
    pattern = re.compile(rf"\.{re.escape(host())}-(\d+)-[0-9a-f]{{8}}{re.escape(PARTIAL)}$")
    for path in folder.glob(f"{name}.*{PARTIAL}"):
        if (found := pattern.search(path.name)) and not running(int(found[1])):
            remove(path)


def running(process: int) -> bool:
    """Whether a process of this machine is running; True if that cannot be known."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # of another user
        return True
    return True


@contextlib.contextmanager
def replacing(path: Path, mode: str = "w", old: Optional[Path] = None, **settings: Any) -> Iterator[IO]:
    """Opens a new file that replaces `path` when the block ends without an error.

    Args:
        path: File to replace or create; if it is a link, the link is replaced, not its target.
        mode: `w` for UTF-8 text, `wb` for bytes.
        old: See `put`.
        settings: Other arguments of `open`.
    """
    remove_stale(path.parent, glob.escape(path.name))
    partial = temporary(path)
    encoding = {} if "b" in mode else {"encoding": "utf-8"}
    try:
        with open(partial, mode.replace("w", "x"), **(encoding | settings)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        put(partial, path, old)
    finally:
        partial.unlink(missing_ok=True)


def put(new: Path, path: Path, old: Optional[Path] = None) -> None:
    """Renames a finished file or folder to its final name; only then is an existing one of that name removed.

    Args:
        new: The finished file or folder, in the same folder as `path`.
        path: Its final name.
        old: Name that an existing folder gets while the new one is renamed, so that it can be found if the process is
            killed. Anything that already has this name is removed. Default: a temporary name.
    """
    before = old or temporary(path)
    folder = path.is_dir() and not path.is_symlink()
    if folder or (new.is_dir() and os.path.lexists(path)):  # a rename cannot replace a folder
        remove(before)
        path.rename(before)
    os.replace(new, path)
    sync(path.parent)
    remove(before)


def write_text(path: Path, text: str) -> None:
    """Writes text as UTF-8 to a file, which is replaced if it exists; lone surrogates are escaped."""
    with replacing(path, errors="backslashreplace") as file:
        file.write(text)


def write_picture(path: Path, figure: "Figure", **settings: Any) -> None:
    """Writes a figure of matplotlib as PNG to a file, which is replaced if it exists.

    Args:
        path: The file.
        figure: The figure.
        settings: Other arguments of `savefig`.
    """
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, **settings)
    with replacing(path, "wb") as file:
        file.write(picture.getbuffer())


def append(path: Path, text: str) -> None:
    """Appends text in UTF-8 to a file, which is created if it does not exist.

    Raises:
        UserError: If it is a link.
    """
    if path.is_symlink():
        raise UserError(f"{printable(str(path))} is a link, and its target would be changed: remove the link")
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    with open(os.open(path, flags, 0o666), "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder to write into, which replaces `folder` when the block ends without an error."""
    remove_stale(folder.parent, glob.escape(folder.name))
    partial = temporary(folder)
    partial.mkdir(parents=True)
    try:
        yield partial
        sync_tree(partial)
        put(partial, folder)
    finally:
        remove(partial)


@contextlib.contextmanager
def new_folder(folder: Path, locked: bool) -> Iterator[Path]:
    """Yields a folder to write into, which becomes `folder` when the block ends without an error.

    If another process has created `folder` in the meantime, that one is kept and this one is removed.

    Args:
        folder: Folder to create; it must not exist.
        locked: Whether a lock guarantees that no other process is writing the same folder, so that unfinished folders
            of killed processes can be removed.
    """
    if locked:
        for stale in folder.parent.glob(f"{glob.escape(folder.name)}.*{PARTIAL}"):
            remove(stale)
    partial = temporary(folder)
    partial.mkdir(parents=True)
    try:
        yield partial
        sync_tree(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        remove(partial)
    sync(folder.parent)


def unwritable(folder: Path) -> str:
    """The reason why a folder cannot be written or replaced; empty if it can be."""
    try:
        new = temporary(folder)
        new.mkdir(parents=True)
        new.rmdir()
        if folder.exists():
            new = temporary(folder / "config.json")
            new.touch(exist_ok=False)
            new.unlink()
    except OSError as error:
        return str(error.strerror)
    return ""


def remove(path: Path) -> None:
    """Removes a file, a link or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_tree(folder: Path) -> None:
    """Flushes a folder with all its files to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    sync(folder)


def sync(folder: Path) -> None:
    """Flushes the list of names of a folder to the disk."""
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
