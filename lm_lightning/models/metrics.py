"""Metrics that torchmetrics lacks: sums over batches and processes in, numbers out."""

import math
from typing import Literal, Optional

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


class LossRatio(Ratio):
    """A mean loss over all batches, and over the batches of each corpus of a mixture.

    Attributes:
        corpus: The corpus of the next batch; None if the data has no corpora.
        parts: The mean loss of each corpus that had a batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.corpus: Optional[str] = None
        self.parts: dict[str, Ratio] = {}

    def update(self, total: Tensor, count: Tensor) -> None:
        super().update(total, count)
        if self.corpus is not None:
            if self.corpus not in self.parts:
                self.parts[self.corpus] = Ratio().to(total.device)
            self.parts[self.corpus].update(total, count)

    def reset(self) -> None:
        super().reset()
        self.parts = {}


def bits_per_byte(loss: Tensor, targets: int, size: int) -> Tensor:
    """Converts a loss in nats per target token to bits per byte of the text, () float32.

    Args:
        loss: The loss.
        targets: Number of target tokens of the text.
        size: Number of its UTF-8 bytes.
    """
    return loss / math.log(2) * (targets / max(1, size))


def added(total: Tensor, error: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """A sum with a value added, and the sum of all rounding errors so far (Neumaier, 1974)."""
    value = value.to(total.dtype)
    new = total + value
    lost = torch.where(total.abs() >= value.abs(), (total - new) + value, (value - new) + total)
    return new, error + lost.where(new.isfinite(), torch.zeros_like(lost))
