"""Modified Kneser-Ney smoothing (Chen and Goodman, 1998): from adjusted counts to tables of probabilities.

The probability of a token w after a context h is interpolated with that after the shorter context h':

    p(w | h) = (a(h w) - D(a(h w))) / sum_v a(h v) + gamma(h) p(w | h')

where a are adjusted counts, D has three discounts for each order, for a = 1, 2 and more, and gamma(h) is what the
discounts have taken. The shortest context is interpolated with the uniform distribution.

Tables form a trie: the n-grams of an order are numbered in the order of their tokens, and the key of one is
`number of its first n - 1 tokens * vocabulary + last token`, so that keys are sorted, too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lm_lightning.baselines.counts import chunks, counts_of_counts, token

FALLBACK = (0.5, 1.0, 1.5)  # discounts where there are too few n-grams to estimate them, those of KenLM


@dataclass
class Tables:
    """Probabilities of n-grams of up to `order` tokens.

    Attributes:
        unigrams: Probability of each token without context, (V,) float32.
        keys: Keys of the n-grams of 2, 3, ... tokens, ascending, (n,) int64 each.
        own: The part of the probability that comes from an n-gram's own count, (n,) float32, for each of these orders.
        shares: Weight of the shorter context's probability after each n-gram, (n,) float32, for 1, ..., order - 1
            tokens; 1 for those that nothing follows.
        discounts: The three discounts of each order, from 1.
        estimated: Whether they were estimated for each order, or are `FALLBACK`.
    """

    unigrams: np.ndarray
    keys: list[np.ndarray]
    own: list[np.ndarray]
    shares: list[np.ndarray]
    discounts: list[tuple[float, float, float]]
    estimated: list[bool]


def discounts_of(found: list[int]) -> tuple[tuple[float, float, float], bool]:
    """The discounts of an order from its counts of counts, and whether these are enough to estimate them."""
    if min(found) > 0:
        one, two, three, four = found
        share = one / (one + 2 * two)
        values = (1 - 2 * share * two / one, 2 - 3 * share * three / two, 3 - 4 * share * four / three)
        if all(0 < value <= count for count, value in enumerate(values, start=1)):  # 0 leaves nothing for unseen tokens
            return values, True
    return FALLBACK, False


def find(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The index in sorted keys of each wanted key, which must be among them."""
    places = np.searchsorted(keys, wanted)
    assert np.array_equal(keys[np.minimum(places, len(keys) - 1)], wanted), "the first part of an n-gram is one, too"
    return places


def estimate(levels: Mapping[int, np.ndarray], vocab_size: int, folder: Path, limit: int) -> Tables:
    """Estimates probabilities.

    Args:
        levels: Sorted rows of adjusted counts by the number of tokens, see `counts`.
        vocab_size: Number of tokens.
        folder: An existing folder for the tables, which are memory-mapped.
        limit: Number of n-grams that are held in memory.
    """
    discounts, estimated = [], []
    for level in range(1, len(levels) + 1):
        values, enough = discounts_of(counts_of_counts(chunks(levels[level], limit)))
        discounts.append(values)
        estimated.append(enough)

    adjusted = np.zeros(vocab_size)
    adjusted[token(levels[1], 0)] = levels[1][:, 2]
    discounted = np.array([0, *discounts[0]])[np.minimum(adjusted, 3).astype(int)]
    unigrams = (adjusted - discounted + discounted.sum() / vocab_size) / adjusted.sum()

    tables = Tables(unigrams.astype(np.float32), [], [], [], discounts, estimated)
    for level in range(2, len(levels) + 1):
        parents = vocab_size if level == 2 else len(levels[level - 1])
        add_level(tables, levels[level], level, parents, vocab_size, folder, limit)
    return tables


def add_level(
    tables: Tables, rows: np.ndarray, level: int, parents: int, vocab_size: int, folder: Path, limit: int
) -> None:
    """Adds the n-grams of `level` tokens to the tables; their first tokens are one of `parents` n-grams."""

    def array(name: str, size: int, kind: type) -> np.ndarray:
        """A new memory-mapped array of zeros."""
        if not size:
            return np.empty(0, kind)
        return np.memmap(folder / f"{level}.{name}", kind, "w+", shape=(size,))

    keys, own = array("keys", len(rows), np.int64), array("own", len(rows), np.float32)
    totals, shares = array("totals", parents, np.int64), array("shares", parents, np.float32)
    discounts = np.array([0, *tables.discounts[level - 1]])
    start = 0
    for part in chunks(rows, limit):
        number = token(part, 0)
        for place in range(1, level - 1):
            number = find(tables.keys[place - 1], number * vocab_size + token(part, place))
        counts = part[:, 2].astype(np.int64)
        keys[start : start + len(part)] = number * vocab_size + token(part, level - 1)
        first, last = number[0], number[-1] + 1
        totals[first:last] += np.bincount(number - first, counts, last - first).astype(np.int64)
        shares[first:last] += np.bincount(number - first, discounts[np.minimum(counts, 3)], last - first)
        start += len(part)
    start = 0
    for part in chunks(rows, limit):
        counts = part[:, 2].astype(np.int64)
        number = keys[start : start + len(part)] // vocab_size
        own[start : start + len(part)] = (counts - discounts[np.minimum(counts, 3)]) / totals[number]
        start += len(part)
    for start in range(0, parents, limit):
        total, share = totals[start : start + limit], shares[start : start + limit]
        share[:] = np.where(total > 0, share / np.maximum(total, 1), 1)
    tables.keys.append(keys)
    tables.own.append(own)
    tables.shares.append(shares)
