"""The cache: folders that are created once, by one of the processes, users and hosts that share it."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from lm_lightning import files
from lm_lightning.errors import UserError


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
