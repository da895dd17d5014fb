"""Sparsity: weights of little importance become zeros."""

from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor, nn

from lm_lightning.compression.calibration import Calibration
from lm_lightning.compression.folder import load
from lm_lightning.errors import UserError
from lm_lightning.networks import by_rows, linear_layers, smallest


class Sparsity:
    """A step of a recipe that makes weights of the blocks' linear layers zero.

    Args:
        pattern: `free`: the share of each layer; `2:4`: two of four inputs in a row, which GPUs compute faster.
        wanda: Whether a weight's importance is its magnitude times the norm of its input, compared within an output
            (Sun et al., 2023, arXiv:2306.11695), and not its magnitude alone.
    """

    def __init__(self, pattern: str = "free", wanda: bool = False) -> None:
        self.pattern, self.wanda = pattern, wanda

    def check(self, network: nn.Module, value: float, modules: Sequence[str]) -> None:
        """Refuses a network whose layers do not have the inputs that the pattern needs."""
        for name, layer in linear_layers(network, modules).items():
            inputs = by_rows(layer, layer.weight).shape[1]
            if self.pattern == "2:4" and inputs % 4:
                raise UserError(f"{name} has {inputs} inputs, no multiple of 4, which the recipe 2:4 needs")

    @torch.no_grad()
    def __call__(
        self, source: Path, target: Path, value: float, calibration: Optional[Calibration], modules: Sequence[str]
    ) -> None:
        network = load(source)
        self.check(network, value, modules)
        norms: dict[str, Tensor] = {}
        if self.wanda:
            if calibration is None:
                raise UserError("the recipes with wanda need data to measure inputs by: give a run folder, or --config")
            norms = calibration(source).norms
        for name, layer in linear_layers(network, modules).items():
            rows = by_rows(layer, layer.weight)
            scores = rows.abs() * norms[name] if self.wanda else rows.abs()
            if self.pattern == "2:4":
                zero = smallest(scores.unflatten(1, (-1, 4)), 0.5).flatten(1)
            elif self.wanda:
                zero = smallest(scores, value)
            else:
                zero = smallest(scores.flatten(), value).view_as(scores)
            rows.masked_fill_(zero, 0)
        network.save_pretrained(target)


def semi_structured(network: nn.Module) -> None:
    """Has a network on a GPU compute its layers of the pattern 2:4 by the kernels that skip their zeros.

    Those of other shapes than the kernels know are left as they are.
    """
    for layer in linear_layers(network).values():
        weight, rows = layer.weight, by_rows(layer, layer.weight)
        known = type(layer) is nn.Linear and type(weight) is nn.Parameter and weight.dtype == torch.bfloat16
        if not known or weight.shape[0] % 32 or weight.shape[1] % 64:
            continue
        if ((rows.unflatten(1, (-1, 4)) == 0).sum(2) >= 2).all():
            layer.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(weight.detach()), requires_grad=False)
