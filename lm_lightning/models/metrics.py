"""Metrics that torchmetrics lacks: sums over batches and processes in, numbers out."""

from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric

Mode = Literal["min", "max"]


class Ratio(Metric):
    """A sum divided by another, such as losses by tokens, over all batches and processes.

    If a value is NaN, so is the result. (torchmetrics' MeanMetric omits NaN, and waits for the device at each batch to
    find it; if this is switched off, its version 1.9 ignores the weights.)
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

        Their rounding errors are also summed (Kahan, 1965). Otherwise, in float32, the result would depend on the
        number of rows in a batch, and a count could not exceed 2^24. Not every device has float64.
        """
        self.total, self.total_error = added(self.total, self.total_error, total)
        self.count, self.count_error = added(self.count, self.count_error, count)

    def compute(self) -> Tensor:
        """The ratio of the sums, () float32."""
        return (self.total + self.total_error) / (self.count + self.count_error)


def added(total: Tensor, error: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """A sum with a value added, and the sum of all rounding errors so far (Neumaier, 1974)."""
    value = value.to(total.dtype)
    new = total + value
    lost = torch.where(total.abs() >= value.abs(), (total - new) + value, (value - new) + total)
    return new, error + lost.where(new.isfinite(), torch.zeros_like(lost))
