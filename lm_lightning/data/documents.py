"""The documents of a corpus on disk, to which functions are applied in several processes.

The texts are in one file, and only these are in memory: 26 bytes for each document, the texts of the documents that
the processes work on, and what a function returns for a few batches. The files of a folder are:

    texts          the texts in UTF-8
    names          the names in UTF-8
    offsets.npy    int64, where the text of each document starts in `texts`
    sizes.npy      int64, number of bytes of each text
    splits.npy     uint8, the split of each document, an index of `SPLITS`
    labels.npy     int64, where the name of each document starts in `names`; one more, for the end of the last
"""

import multiprocessing
import os
import signal
import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Optional, TypeVar

import numpy as np

from lm_lightning import processes
from lm_lightning.data.verdicts import SPLITS, Document
from lm_lightning.errors import UserError

T = TypeVar("T")
BATCH = 1 << 20  # bytes of text that a process gets at once
ALONE = 1 << 24  # bytes of a corpus that is too small for several processes, which take a second to start
LONGEST = 1 << 27  # maximum number of characters of a document, which has to fit into memory, as rows do
ARRAYS = ("offsets", "sizes", "splits", "labels")


class Documents:
    """The documents of a corpus, those that remain after the filters so far.

    Args:
        folder: Folder for the files.
        pieces: The pieces that `corpus.read` yields.
        total: Approximate number of UTF-8 bytes of the pieces; None if unknown.
        processes: Number of processes; None for the number of CPU cores.

    Attributes:
        folder: The folder, in which a filter may write temporary files with names that start with `temporary`.
        splits: The split of each document, an index of `SPLITS`, (documents,) uint8.
        remaining: Whether each document remains, (documents,) bool.
        task: What is done, for the progress bar.
    """

    def __init__(
        self, folder: Path, pieces: Iterable[Any], total: Optional[int], processes: Optional[int] = None
    ) -> None:
        self.folder, self.task = folder, ""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.processes = processes or cores
        self.pool: Optional[ProcessPoolExecutor] = None
        self._load(pieces, total)
        self.remaining = np.ones(len(self.splits), bool)
        self.file = open(folder / "texts", "ab+")  # noqa: SIM115
        self.name_file = open(folder / "names", "rb")  # noqa: SIM115

    def _load(self, pieces: Iterable[Any], total: Optional[int]) -> None:
        """Copies the corpus into the files."""
        offsets, sizes, labels, splits = array("q"), array("q"), array("q", [0]), array("B")
        position, size, characters = 0, 0, 0
        with (
            open(self.folder / "texts", "wb", 1 << 20) as texts,
            open(self.folder / "names", "wb", 1 << 16) as names,
            progress(total, "read the corpus") as bar,
        ):
            for piece in pieces:
                data = piece.text.encode()
                texts.write(data)
                size += len(data)
                characters += len(piece.text)
                if characters > LONGEST:
                    raise UserError(
                        f"the document {piece.name} has more than {LONGEST:,} characters, too many for filters, which "
                        "hold a document in memory: choose smaller documents with the option `document` of the corpus"
                    )
                if piece.last:
                    name = piece.name.encode(errors="replace")
                    names.write(name)
                    offsets.append(position)
                    sizes.append(size)
                    labels.append(labels[-1] + len(name))
                    splits.append(SPLITS.index(piece.split))
                    bar.update(size)
                    position, size, characters = position + size, 0, 0
        self.offsets, self.sizes, self.labels, self.splits = map(np.array, (offsets, sizes, labels, splits))

    def __len__(self) -> int:
        return len(self.splits)

    def count(self) -> dict[str, int]:
        """Number of the documents that remain, and of their UTF-8 bytes."""
        return {"documents": int(self.remaining.sum()), "bytes": int(self.sizes[self.remaining].sum())}

    def size(self, number: int) -> int:
        """Number of UTF-8 bytes of a document."""
        return int(self.sizes[number])

    def text(self, number: int) -> str:
        """The text of a document."""
        self.file.seek(self.offsets[number])
        return self.file.read(self.sizes[number]).decode()

    def name(self, number: int) -> str:
        """The name of a document."""
        self.name_file.seek(self.labels[number])
        return self.name_file.read(self.labels[number + 1] - self.labels[number]).decode()

    def replace(self, number: int, text: str) -> None:
        """Gives a document another text."""
        data = text.encode(errors="replace")
        self.file.seek(0, os.SEEK_END)
        self.offsets[number], self.sizes[number] = self.file.tell(), len(data)
        self.file.write(data)
        self.file.flush()

    def map(
        self, function: Callable[[Document], Optional[T]], where: Optional[np.ndarray] = None, task: str = ""
    ) -> Iterator[tuple[int, T]]:
        """Applies a function to the documents that remain, in several processes.

        Args:
            function: A picklable function, such as one of a module or a method of a filter.
            where: Which of the documents, (documents,) bool. Default: all that remain.
            task: What is done, for the progress bar.

        Yields:
            The number of each document and the function's result, in the order of the documents; those for which the
            function returns None or an empty list are omitted.
        """
        numbers = np.flatnonzero(self.remaining if where is None else self.remaining & where)
        total = int(self.sizes[numbers].sum())
        path = str(self.folder / "texts")
        arguments = (
            (function, path, part, self.offsets[part], self.sizes[part], self.splits[part])
            for part in batches(numbers, self.sizes)
        )
        with progress(total, task or self.task) as bar:
            for results, size in self._results(arguments, total):
                yield from results
                bar.update(size)

    def _results(self, arguments: Iterator[tuple], total: int) -> Iterator[tuple[list, int]]:
        """Calls `work` with arguments, in the processes if there are enough, and yields the results in order."""
        if self.processes == 1 or total < ALONE:
            yield from (work(*batch) for batch in arguments)
            return
        if self.pool is None:
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(self.processes, mp_context=context, initializer=begin)
        waiting: deque[Future] = deque()
        try:
            for batch in arguments:
                waiting.append(self.pool.submit(work, *batch))
                if len(waiting) > 2 * self.processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "a process that filters was killed, perhaps because memory ran out: use fewer with the option "
                "`filter_processes` of the corpus"
            ) from error

    def save(self) -> None:
        """Writes the list of the documents that remain, and removes temporary files."""
        for path in self.folder.glob("temporary*"):
            path.unlink()
        keep = self.remaining
        # Names stay where they are, so that each needs its own end.
        arrays = {"offsets": self.offsets[keep], "sizes": self.sizes[keep], "splits": self.splits[keep]}
        arrays["labels"] = np.stack([self.labels[:-1][keep], self.labels[1:][keep]], axis=1)
        for name, values in arrays.items():
            np.save(self.folder / f"{name}.npy", values)

    def close(self) -> None:
        """Ends the processes and closes the files."""
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
        self.file.close()
        self.name_file.close()


def batches(numbers: np.ndarray, sizes: np.ndarray) -> Iterator[np.ndarray]:
    """Cuts the numbers of documents into parts of about `BATCH` bytes of text, and at least one document."""
    ends = np.cumsum(sizes[numbers])
    start = 0
    while start < len(numbers):
        done = ends[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(ends, done + BATCH, side="right")))
        yield numbers[start:end]
        start = end


def work(
    function: Callable[[Document], T],
    path: str,
    numbers: np.ndarray,
    offsets: np.ndarray,
    sizes: np.ndarray,
    splits: np.ndarray,
) -> tuple[list[tuple[int, T]], int]:
    """Applies a function to a batch of documents; returns the results, and the number of bytes of the documents."""
    found = []
    with open(path, "rb") as file:
        for number, offset, size, split in zip(numbers.tolist(), offsets.tolist(), sizes.tolist(), splits.tolist()):
            file.seek(offset)
            result = function(Document(number, SPLITS[split], file.read(size).decode()))
            if result is not None and (not isinstance(result, list) or result):
                found.append((number, result))
    return found, int(sizes.sum())


def begin() -> None:
    """Prepares a process: Ctrl-C is the matter of the process that started it, with which it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        processes.kill_with_parent()


def progress(total: Optional[int], task: str) -> Any:
    """A progress bar of bytes with speed and time left, on a terminal only."""
    from tqdm import tqdm

    return tqdm(total=total, unit="B", unit_scale=True, desc=task, leave=False, disable=None)


def saved(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yields split, name and text of the documents that `Documents.save` has written, in the order of the corpus."""
    arrays = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS)
    with open(folder / "texts", "rb") as texts, open(folder / "names", "rb") as names:
        for offset, size, split, (start, end) in zip(*arrays):
            texts.seek(offset)
            names.seek(start)
            yield SPLITS[split], names.read(end - start).decode(), texts.read(size).decode()
