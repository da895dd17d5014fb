"""The linear layers of a network's blocks."""

import fnmatch
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lm_lightning.errors import UserError
from lm_lightning.networks import blocks


def linear_layers(network: Any, patterns: Sequence[str] = ()) -> dict[str, nn.Linear]:
    """The linear layers of a network's blocks by their names, including GPT-2's `Conv1D`.

    Args:
        network: A network of `transformers`.
        patterns: Patterns of names, such as `*mlp*`; only matching layers are returned. Default: all.

    Raises:
        UserError: If no layer matches.
    """
    inside = {id(module) for block in blocks(network) for module in block.modules()}
    found = {
        name: module
        for name, module in network.named_modules()
        if id(module) in inside and isinstance(module, (nn.Linear, Conv1D))
    }
    chosen = {
        name: m for name, m in found.items() if not patterns or any(fnmatch.fnmatchcase(name, p) for p in patterns)
    }
    if not chosen:
        raise UserError(f"{', '.join(patterns)} matches no linear layer, such as {', '.join(list(found)[:3])}")
    return chosen


def by_rows(module: nn.Linear, weight: Tensor) -> Tensor:
    """A view of a weight, or of a tensor of its shape, as (outputs, inputs)."""
    return weight.T if isinstance(module, Conv1D) else weight
