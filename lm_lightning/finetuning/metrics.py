"""Metrics of labelled data that torchmetrics does not have."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.regression import pearson_corrcoef, spearman_corrcoef
from torchmetrics.utilities import dim_zero_cat


class Agreement(Metric):
    """How predicted numbers agree with the correct ones: Pearson's and Spearman's correlation, mean absolute error.

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
    """Pearson's and Spearman's correlation of two tensors, (N,) each, computed in float64: () float32 each."""
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
