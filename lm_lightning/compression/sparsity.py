"""Sparsity: sets weights of low importance to zero."""

from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor, nn

from lm_lightning.compression.calibration import Calibration
from lm_lightning.compression.folder import load
from lm_lightning.compression.importance import Pattern, check_pattern, least_important, weight_scores
from lm_lightning.errors import UserError
from lm_lightning.linear_layers.blocks import by_rows, linear_layers


class Sparsity:
    """Sets weights of the blocks' linear layers to zero.

    Args:
        pattern: `free`: a fraction of each layer; `2:4`: two of each four adjacent inputs, which GPUs compute faster.
        wanda: Whether the importance of a weight is its magnitude times the norm of its input, compared within an
            output, instead of its magnitude alone.
    """

    def __init__(self, pattern: Pattern = "free", wanda: bool = False) -> None:
        self.pattern: Pattern = pattern
        self.wanda = wanda

    def check(self, network: nn.Module, value: float, modules: Sequence[str]) -> None:
        """Refuses a network whose layers do not have the inputs that the pattern needs."""
        check_pattern(self.pattern, linear_layers(network, modules))

    @torch.no_grad()
    def __call__(
        self, source: Path, target: Path, value: float, calibration: Optional[Calibration], modules: Sequence[str]
    ) -> None:
        network = load(source)
        self.check(network, value, modules)
        norms: dict[str, Tensor] = {}
        if self.wanda:
            if calibration is None:
                raise UserError("the wanda recipes need data to measure inputs: give a run folder, or --config")
            norms = calibration(source).norms
        for name, layer in linear_layers(network, modules).items():
            zero = least_important(weight_scores(layer, norms.get(name)), value, self.pattern, self.wanda)
            by_rows(layer, layer.weight).masked_fill_(zero, 0)
        network.save_pretrained(target)


def semi_structured(network: nn.Module) -> None:
    """Makes a network on a GPU use kernels that skip zeros for its layers with the pattern 2:4.

    Layers whose shapes these kernels do not support are not changed.
    """
    for layer in linear_layers(network).values():
        weight, rows = layer.weight, by_rows(layer, layer.weight)
        supported = type(layer) is nn.Linear and type(weight) is nn.Parameter and weight.dtype == torch.bfloat16
        if not supported or weight.shape[0] % 32 or weight.shape[1] % 64:
            continue
        if ((rows.unflatten(1, (-1, 4)) == 0).sum(2) >= 2).all():
            layer.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(weight.detach()), requires_grad=False)


def count_zeros(layers: dict[str, nn.Linear]) -> tuple[int, int]:
    """The number of zeros among the weights of layers, and the number of these weights."""
    weights = [layer.weight for layer in layers.values()]
    return sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)
