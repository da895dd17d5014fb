"""Metrics that torchmetrics lacks: sums over batches and processes in, numbers out."""

from typing import Literal, Optional

import torch
from torch import Tensor
from torchmetrics import Metric

Mode = Literal["min", "max"]


def mode_of(metric: Metric) -> Optional[Mode]:
    """The direction in which a metric of torchmetrics is better, None if it has none."""
    return None if metric.higher_is_better is None else "max" if metric.higher_is_better else "min"


class Ratio(Metric):
    """A sum divided by another, such as losses by tokens, over all batches and processes.

    What is not a number stays so. (torchmetrics' MeanMetric waits for the device at each batch to look for those, and
    leaves them out; told not to, its version 1.9 leaves out the weights.)
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: Tensor) -> None:
        """Adds to both sums, () each."""
        self.total += total
        self.count += count

    def compute(self) -> Tensor:
        """Their ratio, () float32."""
        return self.total / self.count


class Counts(Metric):
    """How many of each kind of something, such as spans with a label, are there, are told, and are told rightly.

    Args:
        kinds: Names of the kinds.
    """

    full_state_update = False

    def __init__(self, kinds: list[str]) -> None:
        super().__init__()
        self.numbers = {kind: number for number, kind in enumerate(kinds)}
        self.add_state("counts", torch.zeros(3, len(kinds), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, gold: list[tuple], told: list[tuple]) -> None:
        """Adds what there is in a sentence and what is told of it: pairs of a kind and a place."""
        for row, found in enumerate((set(gold) & set(told), gold, told)):
            for kind, _ in found:
                self.counts[row, self.numbers[kind]] += 1

    def compute(self) -> Tensor:
        """How many are right, there, and told, (3, kinds) int64."""
        return self.counts
