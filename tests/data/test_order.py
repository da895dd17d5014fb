"""Order: a sample's place in the stream depends on nothing but the seed and the position."""

import itertools
from collections import Counter

import numpy as np
import pytest

from lm_lightning.data.order import (
    PADDING,
    SequentialBatches,
    StreamSampler,
    samples_at,
    seed_of,
    sequence_key,
    shuffle,
)

SPLITS = [(1, 1, 8), (1, 4, 2), (2, 2, 2), (4, 1, 2), (1, 8, 1)]  # world_size, accumulate, batch_size: all make 8


# Shuffling


@pytest.mark.parametrize("key", [0, 1, 2**64 - 1, 2**64, 3 * 2**64 + 5])
def test_shuffle_is_a_permutation_of_every_size(key):
    for size in range(1, 201):
        assert sorted(shuffle(np.arange(size), size, key)) == list(range(size))


def test_shuffle_is_a_permutation_of_a_size_that_no_memory_holds():
    size = 10**12 + 39
    indices = np.concatenate([np.arange(50_000), size - 1 - np.arange(50_000), size // 2 + np.arange(50_000)])
    result = shuffle(indices, size, 0)
    assert len(np.unique(result)) == len(indices)
    assert result.min() >= 0 and result.max() < size


def test_shuffle_keeps_the_shape_and_gives_signed_integers():
    result = shuffle(np.arange(6).reshape(2, 3), 10, 0)
    assert result.shape == (2, 3) and result.dtype == np.int64
    assert shuffle(np.arange(0), 10, 0).shape == (0,)


def test_seeds_depend_on_each_number_and_its_place_and_fit_torch():
    numbers = list(itertools.product(range(-1, 4), repeat=4))
    seeds = {seed_of(*own) for own in numbers}
    assert len(seeds) == len(numbers) and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(1, 2) == 6804074658870690613  # the same on every machine and Python


def test_another_key_gives_another_order():
    orders = {tuple(shuffle(np.arange(50), 50, key)) for key in range(200)}
    assert len(orders) == 200


def test_every_order_is_about_equally_likely():
    counts = Counter(tuple(shuffle(np.arange(3), 3, key)) for key in range(3000))
    assert set(counts) == set(itertools.permutations(range(3)))
    assert all(abs(count - 500) < 110 for count in counts.values())  # 5 standard deviations


@pytest.mark.parametrize("size", [100_000, 1 << 20, 10**12])
def test_neighbours_are_spread_evenly_and_independently(size):
    result = shuffle(np.arange(100_000), size, 1) / size
    counts, _ = np.histogram(result, bins=10, range=(0, 1))
    assert abs(counts - 10_000).max() < 500  # 5 standard deviations
    assert abs(np.corrcoef(result[:-1], result[1:])[0, 1]) < 0.016  # the same


# The stream


def test_every_epoch_has_each_sample_once_in_an_order_of_its_own():
    epochs = samples_at(np.arange(5 * 37), 37, seed=1).reshape(5, 37)
    assert (np.sort(epochs, axis=1) == np.arange(37)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_another_seed_gives_another_stream_and_none_repeats_an_epoch_of_another():
    epochs = [tuple(samples_at(np.arange(40), 20, seed)[i : i + 20]) for seed in (-1, 0, 1, 2, 2**40) for i in (0, 20)]
    assert len(set(epochs)) == 10


def test_a_sample_depends_on_its_position_only():
    positions = np.arange(100)
    stream = samples_at(positions, 30, seed=3)
    assert (samples_at(positions[::-1], 30, seed=3) == stream[::-1]).all()
    assert [samples_at(np.array([position]), 30, seed=3)[0] for position in positions] == list(stream)


def test_the_stream_has_no_end():
    far = 10**15
    assert sorted(samples_at(np.arange(far * 7, far * 7 + 7), 7, seed=0)) == list(range(7))


# Training


def window(split, size, consumed, passes=1):
    """Return what each optimizer step reads: micro-batches of all ranks, one list a step."""
    world_size, accumulate, batch_size = split
    done = consumed
    samplers = [
        StreamSampler(size, batch_size, accumulate, rank, world_size, lambda: done) for rank in range(world_size)
    ]
    steps = []
    for _ in range(passes):
        ranks = [list(sampler) for sampler in samplers]
        assert all(len(batches) == len(sampler) for batches, sampler in zip(ranks, samplers, strict=True))
        assert all(len(batch) == batch_size for batches in ranks for batch in batches)
        assert all(len(batches) % accumulate == 0 for batches in ranks), "a pass ends within an optimizer step"
        for start in range(0, len(ranks[0]), accumulate):
            steps.append([batch for batches in ranks for batch in batches[start : start + accumulate]])
            done += world_size * accumulate * batch_size
    return steps


@pytest.mark.parametrize("split", SPLITS)
def test_a_step_reads_the_same_samples_however_it_is_split(split):
    steps = [sorted(itertools.chain(*batches)) for batches in window(split, size=20, consumed=0)]
    assert steps == [list(range(0, 8)), list(range(8, 16)), list(range(16, 24))]  # 20 samples, rounded up to 3 steps


@pytest.mark.parametrize("split", SPLITS)
def test_a_run_that_stopped_goes_on_with_the_same_batches(split):
    whole = window(split, size=20, consumed=0, passes=3)
    for done in range(1, 6):
        rest = window(split, size=20, consumed=8 * done, passes=2)
        assert rest[: len(whole) - done] == whole[done : done + len(rest)]


@pytest.mark.parametrize("split", SPLITS)
def test_the_next_pass_goes_on_where_the_last_one_ended(split):
    positions = itertools.chain(*itertools.chain(*window(split, size=20, consumed=0, passes=3)))
    assert sorted(positions) == list(range(3 * 24))


def test_a_run_may_change_its_split_between_steps():
    first = window((2, 2, 2), size=16, consumed=0)
    second = window((1, 1, 8), size=16, consumed=8 * len(first))
    assert sorted(itertools.chain(*itertools.chain(*first + second))) == list(range(32))


def test_fewer_samples_than_a_step_takes_still_make_a_step():
    assert window((1, 1, 8), size=3, consumed=0) == [[list(range(8))]]


# Evaluation


@pytest.mark.parametrize("size", [1, 4, 5, 8, 9, 17])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_reads_each_sample_once_and_pads_the_end_only(size, batch_size, world_size):
    samplers = [SequentialBatches(size, batch_size, rank, world_size) for rank in range(world_size)]
    ranks = [list(sampler) for sampler in samplers]
    assert {len(batches) for batches in ranks} == {len(samplers[0])}, "ranks differ in their number of batches"
    assert {len(batch) for batches in ranks for batch in batches} == {batch_size}

    in_turns = [position for batches in zip(*ranks, strict=True) for batch in batches for position in batch]
    padding = len(in_turns) - size
    assert in_turns == list(range(size)) + [PADDING] * padding
    assert padding < batch_size * world_size, "a round of batches has nothing but padding"


def test_the_key_of_a_sequence_depends_on_each_number_and_its_place():
    sequences = [[], [0], [0, 0], [1], [1, 2], [2, 1], [1, 2, 3], [1, 3, 2], [3, 2, 1], list(range(5000))]
    keys = [sequence_key(numbers) for numbers in sequences]
    assert len(set(keys)) == len(keys) and all(0 <= key < 2**63 for key in keys)
    assert sequence_key(np.array([1, 2])) == sequence_key((1, 2)) == 5883447104367214746  # on any machine
