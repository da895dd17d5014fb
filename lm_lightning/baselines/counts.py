"""Counts of n-grams on disk: sorted files, which are merged without holding more than a part of them in memory.

An n-gram of up to six tokens is a row of three uint64: its first three tokens, its last three tokens, 21 bits each, and
its count. Rows are in the order of their tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from lm_lightning.errors import UserError

MAX_ORDER = 6
BITS = 21  # for a token
HALF = np.uint64((1 << 3 * BITS) - 1)  # three tokens
SHIFT = np.uint64(BITS)
TWO = np.uint64(2 * BITS)


def pack(tokens: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Rows, (M, 3) uint64, of n-grams, (M, n) of any integer type with n <= 6, and their counts, (M,).

    Raises:
        UserError: If a token needs more than 21 bits.
    """
    if tokens.size and int(tokens.max()) >= 1 << BITS:
        raise UserError(f"n-grams can be counted for vocabularies of up to {1 << BITS:,} tokens: use a smaller one")
    rows = np.zeros((len(tokens), 3), np.uint64)
    for place in range(tokens.shape[1]):
        shift = np.uint64((2 - place % 3) * BITS)
        rows[:, place // 3] |= tokens[:, place].astype(np.uint64) << shift
    rows[:, 2] = counts
    return rows


def token(rows: np.ndarray, place: int) -> np.ndarray:
    """The tokens of rows, (M, 3) uint64, at a place of the n-gram: (M,) int64."""
    shift = np.uint64((2 - place % 3) * BITS)
    return ((rows[:, place // 3] >> shift) & np.uint64((1 << BITS) - 1)).astype(np.int64)


def without_first(rows: np.ndarray) -> np.ndarray:
    """The distinct n-grams of rows without their first tokens: rows whose counts are the numbers of these tokens."""
    shorter = np.empty_like(rows)
    shorter[:, 0] = ((rows[:, 0] << SHIFT) & HALF) | (rows[:, 1] >> TWO)
    shorter[:, 1] = (rows[:, 1] << SHIFT) & HALF
    shorter[:, 2] = 1
    return combine(shorter)


def combine(rows: np.ndarray) -> np.ndarray:
    """Sorts rows, and adds the counts of equal n-grams."""
    if not len(rows):
        return rows
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    new = np.ones(len(rows), bool)
    new[1:] = (rows[1:, :2] != rows[:-1, :2]).any(1)
    first = np.flatnonzero(new)
    counts = np.add.reduceat(rows[:, 2], first)
    rows = rows[first]
    rows[:, 2] = counts
    return rows


def read(path: Path) -> np.ndarray:
    """The rows in a file, memory-mapped, (M, 3) uint64."""
    if not path.stat().st_size:  # an empty file cannot be mapped
        return np.empty((0, 3), np.uint64)
    return np.memmap(path, np.uint64, "r").reshape(-1, 3)


def merge(parts: Sequence[np.ndarray], path: Path, limit: int) -> np.ndarray:
    """Merges sorted rows into one sorted file, and returns its content.

    Args:
        parts: Sorted rows, such as memory maps of files.
        path: The file to write.
        limit: Number of rows that are read at a time. (There may be more if many begin with the same three tokens.)
    """
    total = sum(len(part) for part in parts)
    pieces = max(1, -(-total // limit))
    empty = np.empty((0, 3), np.uint64)
    samples = np.sort(np.concatenate([empty, *(part[:: max(1, len(part) // (8 * pieces))] for part in parts)])[:, 0])
    borders = np.unique(samples[len(samples) * np.arange(1, pieces) // pieces])
    starts = [0] * len(parts)
    with open(path, "wb") as file:
        for border in [*borders, None]:
            stops = [len(p) if border is None else int(np.searchsorted(p[:, 0], border)) for p in parts]
            rows = np.concatenate([empty, *(p[a:b] for p, a, b in zip(parts, starts, stops))])
            combine(rows).tofile(file)
            starts = stops
    return read(path)


def chunks(rows: np.ndarray, limit: int) -> Iterator[np.ndarray]:
    """Parts of rows, in memory."""
    for start in range(0, len(rows), limit):
        yield np.array(rows[start : start + limit])


class Counter:
    """Counts n-grams, in files of a folder.

    Counted are the longest n-grams that end at each target: those of `order` tokens, and shorter ones at the beginning
    of a document or of a block, where fewer tokens are known.

    Args:
        folder: The folder, which is created.
        order: Maximum number of tokens of an n-gram.
        limit: Number of n-grams that are held in memory.
    """

    def __init__(self, folder: Path, order: int, limit: int) -> None:
        self.folder, self.order, self.limit = folder, order, limit
        self.files: list[str] = []  # that are complete
        self.held: dict[int, list[np.ndarray]] = {}
        self.size = 0  # number of n-grams that are held
        self.total = 0  # number of n-grams that were counted
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, context: np.ndarray, known: np.ndarray, targets: np.ndarray) -> None:
        """Counts the n-grams that end at targets.

        Args:
            context: The tokens before each target, (M, order - 1) int.
            known: How many of these, the last ones, are known, (M,) int.
            targets: The targets, (M,) int.
        """
        ngrams = np.concatenate([context, targets[:, None]], axis=1)
        for level in np.unique(known):
            chosen = ngrams[known == level][:, self.order - 1 - level :]
            self.held.setdefault(int(level) + 1, []).append(combine(pack(chosen, np.ones(len(chosen)))))
        self.size += len(targets)
        self.total += len(targets)
        if self.size >= self.limit:
            self.flush()

    def flush(self) -> None:
        """Writes the n-grams that are held in memory."""
        for level, parts in self.held.items():
            name = f"{level}-{len(self.files):06}.counts"
            combine(np.concatenate(parts)).tofile(self.folder / name)
            self.files.append(name)
        self.held, self.size = {}, 0

    def resume(self, files: Sequence[str], total: int) -> None:
        """Continues after those files that a checkpoint names.

        Raises:
            UserError: If one is missing.
        """
        for name in files:
            if not (self.folder / name).is_file():
                raise UserError(f"{self.folder / name} is missing, so counting cannot be resumed: start a new run")
        for path in self.folder.glob("*.counts"):
            if path.name not in files:  # written after the checkpoint
                path.unlink()
        self.files, self.total = list(files), total

    def adjusted(self, folder: Path) -> dict[int, np.ndarray]:
        """The adjusted counts of Kneser and Ney (1995) of all n-grams, by the number of their tokens, sorted.

        The longest n-grams have their counts. Shorter ones have the number of different tokens before them, or, where
        nothing is before them, as at the beginning of a document, also their counts there.

        Args:
            folder: An existing folder, in which the results are files.
        """
        self.flush()
        levels: dict[int, np.ndarray] = {}
        for level in range(self.order, 0, -1):
            parts = [read(self.folder / name) for name in self.files if name.startswith(f"{level}-")]
            if level < self.order:
                for number, rows in enumerate(chunks(levels[level + 1], self.limit)):
                    # Equal n-grams of different chunks have different first tokens, as each row is distinct.
                    path = folder / f"{level}-part-{number}"
                    without_first(rows).tofile(path)
                    parts.append(read(path))
            levels[level] = merge(parts, folder / f"{level}.adjusted", self.limit)
            del parts
            for path in folder.glob("*-part-*"):
                path.unlink()
        return levels


def counts_of_counts(rows: Iterable[np.ndarray]) -> list[int]:
    """How many n-grams have the counts 1, 2, 3 and 4."""
    found = np.zeros(5, np.int64)
    for part in rows:
        found += np.bincount(np.minimum(part[:, 2], 5).astype(np.int64), minlength=6)[:5]
    return found[1:].tolist()
