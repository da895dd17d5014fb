"""Interleaving: decides from which corpus of a mixture each sample of the stream is.

It is a pure function of the position in the stream and of the shares. Within each stage, the number of samples of a
corpus differs from its share of the samples by less than one at any time, which random draws do not achieve.
"""

import bisect
import functools
import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

LARGEST = 1 << 16  # length of the longest cycle; shares that need a longer one are rounded


class Cycle(NamedTuple):
    """A sequence of corpora that is repeated.

    Attributes:
        corpora: The corpus of each position, (cycle,) int64.
        before: How many earlier positions of the cycle have the same corpus, (cycle,) int64.
    """

    corpora: np.ndarray
    before: np.ndarray


class Stage(NamedTuple):
    """A part of the stream with constant shares.

    Attributes:
        start: Its first position.
        counts: The number of samples of each corpus in a cycle.
    """

    start: int
    counts: tuple[int, ...]

    def share(self, corpus: int) -> float:
        """The share of a corpus."""
        return self.counts[corpus] / sum(self.counts)


def whole_numbers(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in the ratio of weights, with a sum of at most `LARGEST`.

    They are exact if such numbers exist, as for 0.7 and 0.3. Otherwise they are rounded, but positive weights are not
    rounded to 0.

    Args:
        weights: Non-negative numbers, not all 0.
    """
    fractions = [Fraction(repr(float(weight))) for weight in weights]
    common = math.lcm(*(fraction.denominator for fraction in fractions))
    exact = [int(fraction * common) for fraction in fractions]
    divisor = math.gcd(*exact)
    if sum(exact) // divisor <= LARGEST:
        return tuple(number // divisor for number in exact)
    wanted = [fraction / sum(fractions) * LARGEST for fraction in fractions]
    counts = [max(1, math.floor(number)) if number else 0 for number in wanted]
    while (missing := LARGEST - sum(counts)) != 0:
        step = 1 if missing > 0 else -1
        able = [i for i, count in enumerate(counts) if count > (1 if step < 0 else 0)]
        counts[max(able, key=lambda i: step * (wanted[i] - counts[i]))] += step
    divisor = math.gcd(*counts)
    return tuple(count // divisor for count in counts)


@functools.lru_cache(maxsize=64)
def cycle(counts: tuple[int, ...]) -> Cycle:
    """The cycle with these numbers of samples of each corpus, spread as evenly as possible.

    After n samples, the number of samples of a corpus with share p differs from n·p by at most 1 - 1/(2k - 2) in a
    mixture of k corpora. Each sample is from the corpus that would first exceed this bound if it had to wait, among
    those that are not too early. Source: Tijdeman, The chairman assignment problem, Discrete Mathematics 32, 1980.
    """
    total, parts = sum(counts), [i for i, count in enumerate(counts) if count]
    room = max(1, 2 * len(parts) - 2)
    used = [0] * len(counts)
    waiting: list[tuple[int, int]] = []  # corpora whose next sample is too early, by its earliest position
    ready: list[tuple[float, int]] = []  # the others, by the latest position of their next sample
    for part in parts:
        heapq.heappush(waiting, (-(-total // (room * counts[part])), part))
    corpora, before = np.zeros(total, np.int64), np.zeros(total, np.int64)
    for position in range(1, total + 1):
        while waiting and (waiting[0][0] <= position or not ready):
            part = heapq.heappop(waiting)[1]
            heapq.heappush(ready, ((room * used[part] + room - 1) / counts[part], part))
        part = heapq.heappop(ready)[1]
        corpora[position - 1], before[position - 1] = part, used[part]
        used[part] += 1
        heapq.heappush(waiting, (-(-total * (1 + room * used[part]) // (room * counts[part])), part))
    return Cycle(corpora, before)


class Interleaving:
    """Maps each position of the stream to a corpus, and to a position in the stream of this corpus.

    Args:
        stages: The stages, from the first position, 0, on; all with the same number of corpora.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = list(stages)
        self.starts = [stage.start for stage in self.stages]
        self.used = [[0] * len(self.stages[0].counts)]  # samples of each corpus before each stage
        for number, start in enumerate(self.starts[1:]):
            self.used.append(self._counts(number, start))

    def stage(self, position: int) -> int:
        """The number of the stage of a position."""
        return bisect.bisect_right(self.starts, position) - 1

    def locate(self, position: int) -> tuple[int, int]:
        """The corpus of a position, and the position in the endless stream of this corpus."""
        number = self.stage(position)
        counts = self.stages[number].counts
        corpora, before = cycle(counts)
        cycles, place = divmod(position - self.starts[number], len(corpora))
        corpus = int(corpora[place])
        return corpus, self.used[number][corpus] + cycles * counts[corpus] + int(before[place])

    def counts(self, position: int) -> list[int]:
        """The number of samples of each corpus before a position."""
        return self._counts(self.stage(position), position)

    def _counts(self, number: int, position: int) -> list[int]:
        counts = self.stages[number].counts
        corpora = cycle(counts).corpora
        cycles, place = divmod(position - self.starts[number], len(corpora))
        rest = np.bincount(corpora[:place], minlength=len(counts))
        return [
            used + cycles * count + int(more) for used, count, more in zip(self.used[number], counts, rest, strict=True)
        ]
