"""The cache: folders that are created once, by one of the processes, users and hosts that share it."""

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lm_lightning import files
from lm_lightning.errors import UserError

DEFAULT = os.environ.get("LM_LIGHTNING_CACHE", "~/.cache/lm_lightning")


def folder_of(cache_dir: str) -> Path:
    """The folder of a cache, which is created if it does not exist; `~` is expanded.

    Raises:
        UserError: If it cannot be created.
    """
    cache = Path(cache_dir).expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot create the cache {cache} ({error.strerror}): choose another --data.cache_dir"
        ) from error
    return cache


def content(path: Path, cache: Path) -> str:
    """A hash of a file's content, which is cached until its size or modification time changes."""
    stat = path.stat()
    known = cache / "hashes" / hashlib.blake2b(os.path.realpath(path).encode(), digest_size=16).hexdigest()
    state = f"{stat.st_size} {stat.st_mtime_ns} "
    if known.exists() and (saved := known.read_text(encoding="utf-8")).startswith(state):
        return saved.removeprefix(state)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    with contextlib.suppress(PermissionError):  # a cache of another user, perhaps: it can be read all the same
        known.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(known, state + digest.hexdigest())
    return digest.hexdigest()


def described(folder: Path) -> dict[str, dict[str, int]]:
    """Size, modification time and checksum of each file in a folder."""
    return {
        path.name: {"size": path.stat().st_size, "modified": path.stat().st_mtime_ns, "crc32": files.checksum(path)}
        for path in sorted(folder.iterdir())
    }


def check_files(folder: Path, entries: Mapping[str, Any], what: str, remedy: str) -> None:
    """Refuses files that have changed since `described` was called.

    Sizes are always compared; checksums are, if the size or modification time of a file has changed.

    Args:
        folder: Their folder.
        entries: The result of `described`, as read from a file.
        what: What the files are, such as `the tokenized corpus`, for messages.
        remedy: What to do, for messages.

    Raises:
        UserError: Names the file.
    """
    for name, entry in entries.items():
        try:
            stat = (folder / name).stat()
            changed = stat.st_size != entry["size"] or (
                stat.st_mtime_ns != entry["modified"] and files.checksum(folder / name) != entry["crc32"]
            )
        except (OSError, KeyError, TypeError) as error:
            raise UserError(f"{folder / name} of {what} cannot be read ({error}): {remedy}") from error
        if changed:
            raise UserError(
                f"{folder / name} of {what} has changed since it was written ({stat.st_size:,} bytes of "
                f"{entry['size']:,}, or another checksum): {remedy}"
            )


def make_once(folder: Path, cache: Path, work: str, make: Callable[[Path], None]) -> None:
    """Creates a folder of the cache, unless it exists.

    Several processes, users and hosts may share a cache: one creates the folder while the others wait and print why.
    An existing folder is used without a lock, so that the cache may be read-only. If files cannot be locked, as on some
    network file systems, each process creates the folder, and the first result is kept.

    Args:
        folder: Folder to create.
        cache: Folder of the cache; its folder `locks` has a lock for each folder of the cache.
        work: What is being done, such as `tokenizing the corpus`, for messages.
        make: A function that is called with the path of a new folder and writes its files.

    Raises:
        UserError: If the cache cannot be written.
    """
    if folder.exists():
        return
    try:
        with lock(cache, folder.name, work) as locked:
            if not folder.exists():
                with files.new_folder(folder, locked) as partial:
                    make(partial)
    except OSError as error:
        raise UserError(f"the cache {cache} cannot be written ({error}): choose another --data.cache_dir") from error


@contextlib.contextmanager
def lock(cache: Path, name: str, work: str) -> Iterator[bool]:
    """Waits for the lock with a name and holds it; yields False if the file system does not support locks."""
    from filelock import FileLock, Timeout

    (cache / "locks").mkdir(exist_ok=True)
    own = FileLock(cache / "locks" / f"{name}.lock", mode=0o666)  # other users must be able to open it, too
    try:
        own.acquire(timeout=3)
    except Timeout:
        print(f"waiting for another process that is {work} (lock: {own.lock_file})", file=sys.stderr)
        own.acquire()
    except NotImplementedError:
        yield False
        return
    try:
        yield True
    finally:
        own.release()
