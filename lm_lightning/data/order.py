"""Order: decides which sample is used at which step.

The samples of a split form an endless stream: the shuffled epoch 0, then epoch 1 in a different order, and so on. The
sample at a position of the stream is a pure function of (seed, epoch, index), so a run that has consumed `n` samples
resumes at position `n` with any number of workers, ranks or micro-batches, and only `n` has to be saved.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

PADDING = -1  # position of a sample without targets, which pads the last batches so that all ranks have the same number


def shuffle(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """Maps `indices` by a pseudo-random permutation of [0, size), without storing the permutation.

    A Feistel network permutes the next power of four; results outside of [0, size) are mapped again until they are
    inside ("cycle walking"), so that the mapping is still a permutation. Source: Black and Rogaway, Ciphers with
    Arbitrary Finite Domains, 2002.

    Args:
        indices: Integers in [0, size), any shape.
        size: Number of elements of the permutation.
        key: Different keys give different permutations.

    Returns:
        int64, the shape of `indices`.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))  # bits on each side of the network
    mask = np.uint64((1 << int(half)) - 1)
    keys = mix(np.arange(6, dtype=np.uint64) + mix(np.array([key % 2**64], dtype=np.uint64)))
    result = np.array(indices, dtype=np.uint64)
    walking = np.ones(result.shape, dtype=bool)
    while walking.any():
        left, right = result[walking] >> half, result[walking] & mask
        for round_key in keys:
            left, right = right, left ^ (mix(right ^ round_key) & mask)
        result[walking] = (left << half) | right
        walking = result >= np.uint64(size)
    return result.astype(np.int64)


def mix(x: np.ndarray) -> np.ndarray:
    """A hash of 64-bit integers: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def seed_of(*numbers: int) -> int:
    """A seed in [0, 2**63) for a random generator, which depends on all given integers and on their order."""
    seed = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        seed = mix(seed ^ np.array([number % 2**64], dtype=np.uint64))
    return int(seed[0]) >> 1


def sequence_key(numbers: Sequence[int]) -> int:
    """A hash in [0, 2**63) of non-negative integers, such as the tokens of a text; the same on all machines.

    Unlike `seed_of`, it needs about the same time for thousands of numbers as for one.
    """
    values = np.array(numbers, dtype=np.uint64)
    hashes = mix(values ^ mix(np.arange(len(values), dtype=np.uint64)))
    return seed_of(int(np.bitwise_xor.reduce(hashes)), len(values))


def samples_at(positions: np.ndarray, size: int, seed: int) -> np.ndarray:
    """The samples at the given positions of the endless stream.

    Args:
        positions: Positions of the stream, non-negative integers.
        size: Number of samples in an epoch.
        seed: Seed of the run.

    Returns:
        int64 sample indices in [0, size), the shape of `positions`.
    """
    epochs, indices = np.divmod(np.asarray(positions, dtype=np.int64), size)
    result = np.empty_like(indices)
    seed_key = int(mix(np.array([seed % 2**64], dtype=np.uint64))[0])  # far apart for neighbouring seeds
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        result[chosen] = shuffle(indices[chosen], size, seed_key + int(epoch))
    return result


class StreamSampler(Sampler[list[int]]):
    """Batch sampler for training: yields this rank's positions of the stream, a list for each micro-batch.

    An optimizer step uses the next `world_size * accumulate * batch_size` positions, however they are split; each
    micro-batch is a contiguous part of them. A pass over the sampler is about one epoch of the data, rounded up to full
    optimizer steps, so that no step is incomplete or padded. The next pass begins where the previous one has ended.

    Args:
        size: Number of samples in an epoch.
        batch_size: Number of samples per micro-batch and rank.
        accumulate: Number of micro-batches per optimizer step.
        rank: Rank of this process.
        world_size: Number of processes.
        consumed: Returns the number of samples that finished steps have used, over all ranks; called at the start of a
            pass.
    """

    def __init__(
        self, size: int, batch_size: int, accumulate: int, rank: int, world_size: int, consumed: Callable[[], int]
    ) -> None:
        self.batch_size, self.accumulate, self.rank, self.world_size = batch_size, accumulate, rank, world_size
        self.consumed = consumed
        self.steps = -(-size // (batch_size * accumulate * world_size))

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        start = self.consumed() + self.rank * self.batch_size
        for _ in range(len(self)):
            yield list(range(start, start + self.batch_size))
            start += self.world_size * self.batch_size


class SequentialBatches(Sampler[list[int]]):
    """Batch sampler for evaluation: all ranks together yield every sample exactly once.

    Samples are assigned to the ranks in turn, and the last batches are padded with `PADDING`, so that all ranks have
    the same number of batches (which collectives need), all batches have the same shape (which compiled networks need),
    and no sample counts twice.

    Args:
        size: Number of samples.
        batch_size: Number of samples per batch and rank.
        rank: Rank of this process.
        world_size: Number of processes.
    """

    def __init__(self, size: int, batch_size: int, rank: int, world_size: int) -> None:
        self.size, self.batch_size, self.rank, self.world_size = size, batch_size, rank, world_size

    def __len__(self) -> int:
        return -(-self.size // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(len(self)):
            start = (batch * self.world_size + self.rank) * self.batch_size
            yield [i if i < self.size else PADDING for i in range(start, start + self.batch_size)]
