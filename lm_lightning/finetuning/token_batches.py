"""Batches with a budget of tokens: rows of similar lengths together, many short ones or a few long ones."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from lm_lightning.data.order import PADDING, samples_at, shuffle

CHUNK = 8192  # rows that are sorted together


class Epoch(NamedTuple):
    """An epoch of training.

    Attributes:
        order: The rows, (N,) int64.
        starts: Where each batch begins in `order`, (batches,) int64.
    """

    order: np.ndarray
    starts: np.ndarray


class TokenBatches:
    """The batches of each training epoch, a pure function of seed and epoch.

    The rows of an epoch are shuffled and cut into chunks; each chunk is sorted by length and cut into batches; the
    batches of the epoch are shuffled. A batch is a range of positions in the stream of all epochs.

    Args:
        lengths: Tokens of each row in each of its sequences, such as source and target: (N, sequences) int64.
        max_tokens: Maximum number of tokens of a batch, padding included, of all sequences together.
        seed: Seed of the run.
    """

    def __init__(self, lengths: np.ndarray, max_tokens: int, seed: int) -> None:
        self.lengths, self.max_tokens, self.seed = lengths, max_tokens, seed

    @functools.lru_cache(maxsize=2)  # noqa: B019 (as long-lived as the run)
    def epoch(self, number: int) -> Epoch:
        """An epoch."""
        size = len(self.lengths)
        order = samples_at(np.arange(number * size, (number + 1) * size), size, self.seed)
        batches = []
        for start in range(0, size, CHUNK):
            chunk = order[start : start + CHUNK]
            chunk = chunk[np.lexsort(self.lengths[chunk].T[::-1])]  # by the first sequence, then by the second
            starts = cut(self.lengths[chunk], self.max_tokens)
            batches += np.split(chunk, starts[1:])
        places = np.argsort(shuffle(np.arange(len(batches)), len(batches), self.seed + number))
        batches = [batches[place] for place in places]
        ends = np.cumsum([len(batch) for batch in batches])
        return Epoch(np.concatenate(batches), np.concatenate([[0], ends[:-1]]))

    def after(self, position: int) -> Iterator[range]:
        """The batches from a position of the stream on, which must be the beginning of one, without an end."""
        size = len(self.lengths)
        number = position // size
        while True:
            starts = self.epoch(number).starts
            first = np.searchsorted(starts, position - number * size)
            bounds = (number * size + np.append(starts[first:], size)).tolist()
            yield from map(range, bounds, bounds[1:])
            number += 1
            position = number * size


class TokenBatchSampler(Sampler[list[int]]):
    """Batch sampler for training: yields this rank's batches of the stream, as `StreamSampler` does.

    An optimizer step uses the next `world_size * accumulate` batches, however they are split over the ranks.

    Args:
        batches: The batches.
        accumulate: Number of micro-batches per optimizer step.
        rank: Rank of this process.
        world_size: Number of processes.
        consumed: Returns the position in the stream after the finished steps; called at the start of a pass.
    """

    def __init__(
        self, batches: TokenBatches, accumulate: int, rank: int, world_size: int, consumed: Callable[[], int]
    ) -> None:
        self.batches, self.accumulate, self.rank, self.world_size = batches, accumulate, rank, world_size
        self.consumed = consumed
        # Epochs differ by a few batches. Passes all have the same length, which schedules and progress bars need.
        self.steps = -(-len(batches.epoch(0).starts) // (accumulate * world_size))

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        batches = self.batches.after(self.consumed())
        for _ in range(len(self)):
            group = [next(batches) for _ in range(self.world_size)]
            yield list(group[self.rank])


class TokenEvaluationBatches(Sampler[list[int]]):
    """Batch sampler for evaluation: all ranks together yield each position once, in batches of up to `max_tokens`.

    Args:
        lengths: Tokens of the rows in the order of the evaluation, (N, sequences) int64.
        max_tokens: As in `TokenBatches`.
        rank: Rank of this process.
        world_size: Number of processes.
    """

    def __init__(self, lengths: np.ndarray, max_tokens: int, rank: int, world_size: int) -> None:
        bounds = [*cut(lengths, max_tokens).tolist(), len(lengths)]
        self.batches = [list(range(start, end)) for start, end in zip(bounds, bounds[1:])]
        self.batches += [[PADDING]] * (-len(self.batches) % world_size)
        self.batches = self.batches[rank::world_size]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def cut(lengths: np.ndarray, max_tokens: int) -> np.ndarray:
    """Cuts rows, in their order, into batches of up to `max_tokens` tokens; a row with more is a batch of its own.

    Args:
        lengths: (N, sequences) int64.
        max_tokens: Maximum number of tokens of a batch, padding included.

    Returns:
        Where the batches begin, (batches,) int64.
    """
    starts, longest, rows = [0], [0] * lengths.shape[1], 0
    for place, row in enumerate(lengths.tolist()):
        grown = [max(a, b) for a, b in zip(longest, row)]
        if rows and (rows + 1) * sum(grown) > max_tokens:
            starts.append(place)
            grown, rows = row, 0
        longest, rows = grown, rows + 1
    return np.array(starts)
