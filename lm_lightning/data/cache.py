"""The cache: folders that are made once, by one of the processes, users and hosts that share it."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from lm_lightning import files
from lm_lightning.errors import UserError


def make_once(folder: Path, cache: Path, work: str, make: Callable[[Path], None]) -> None:
    """Makes a folder of the cache, unless it is there already.

    Several processes, users and hosts may share a cache: one works, the others wait and print why. What is there is
    used without a lock, so that the cache may be read-only. Where files cannot be locked, as on some network file
    systems, each process works, and the first result stays.

    Args:
        folder: To be made.
        cache: Folder of the cache, whose `locks` has a lock for each folder.
        work: What is done, such as `tokenizing the corpus`, for messages.
        make: Writes into a folder that it is given.

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
    """Waits for the lock of a name and holds it; False where the file system has no locks."""
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
