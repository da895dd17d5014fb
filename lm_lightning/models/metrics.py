"""Metrics that torchmetrics lacks: sums over batches and processes in, numbers out."""

import torch
from torch import Tensor
from torchmetrics import Metric


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
