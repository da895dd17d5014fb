"""Metrics that torchmetrics lacks: sums over batches and processes in, numbers out."""

from typing import Literal, Optional

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef
from torchmetrics.utilities import dim_zero_cat

Mode = Literal["min", "max"]


def mode_of(metric: Metric) -> Optional[Mode]:
    """The direction in which a metric of torchmetrics is better, None if it has none."""
    return None if metric.higher_is_better is None else "max" if metric.higher_is_better else "min"


class Ratio(Metric):
    """A sum divided by another, such as losses by tokens, over all batches and processes.

    NaN stays NaN. (torchmetrics' MeanMetric waits for the device at each batch to look for NaN, and omits it; if it is
    set not to, its version 1.9 ignores the weights.)
    """

    full_state_update = False
    total: Tensor
    total_error: Tensor
    count: Tensor
    count_error: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "total_error", "count", "count_error"):
            self.add_state(name, torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: Tensor) -> None:
        """Adds to both sums, () each.

        The rounding errors are summed beside them (Kahan, 1965): in float32, the result would depend on how many rows
        a batch has, and a count stays at 2^24. Not every device has float64.
        """
        self.total, self.total_error = added(self.total, self.total_error, total)
        self.count, self.count_error = added(self.count, self.count_error, count)

    def compute(self) -> Tensor:
        """Their ratio, () float32."""
        return (self.total + self.total_error) / (self.count + self.count_error)


def added(total: Tensor, error: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """A sum with one more value, and the sum of what rounding has lost so far (Neumaier, 1974)."""
    value = value.to(total.dtype)
    new = total + value
    lost = torch.where(total.abs() >= value.abs(), (total - new) + value, (value - new) + total)
    return new, error + lost.where(new.isfinite(), torch.zeros_like(lost))


class Agreement(Metric):
    """How predicted numbers agree with the right ones: Pearson's and Spearman's correlation, mean absolute error.

    All rows are kept until the end and computed with in float64. (torchmetrics' PearsonCorrCoef updates its sums in
    float32, so that its value depends on the size of the batches.)
    """

    full_state_update = False
    predicted: list[Tensor]
    right: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("predicted", [], dist_reduce_fx="cat")
        self.add_state("right", [], dist_reduce_fx="cat")

    def update(self, predicted: Tensor, right: Tensor) -> None:
        """Adds the numbers of some rows, (B,) float each."""
        self.predicted.append(predicted)
        self.right.append(right)

    def compute(self) -> dict[str, Tensor]:
        """`pearson`, `spearman` and `mae`, () float32 each."""
        predicted, right = (dim_zero_cat(rows) for rows in (self.predicted, self.right))
        values = correlations(predicted, right)
        return values | {"mae": (predicted - right).abs().mean()}


def correlations(predicted: Tensor, right: Tensor) -> dict[str, Tensor]:
    """Pearson's and Spearman's correlation of two rows of numbers, (N,) each, computed in float64: () float32."""
    device = predicted.device
    predicted, right = predicted.cpu().double(), right.cpu().double()
    values = {"pearson": pearson_corrcoef(predicted, right), "spearman": spearman_corrcoef(predicted, right)}
    return {name: value.float().to(device) for name, value in values.items()}


class Counts(Metric):
    """How many items of each kind, such as spans with a label, are correct, exist, and are predicted.

    Args:
        kinds: Names of the kinds.
    """

    full_state_update = False

    def __init__(self, kinds: list[str]) -> None:
        super().__init__()
        self.numbers = {kind: number for number, kind in enumerate(kinds)}
        self.add_state("counts", torch.zeros(3, len(kinds), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, gold: list[tuple], predicted: list[tuple]) -> None:
        """Adds the items of a sentence and the predicted ones: pairs of a kind and a place."""
        for row, found in enumerate((set(gold) & set(predicted), gold, predicted)):
            for kind, _ in found:
                self.counts[row, self.numbers[kind]] += 1

    def compute(self) -> Tensor:
        """How many are correct, exist, and are predicted, (3, kinds) int64."""
        return self.counts
