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
        UserError: If there are none, or a pattern matches none.
    """
    inside = {id(module) for block in blocks(network) for module in block.modules()}
    found = {
        name: module
        for name, module in network.named_modules()
        if id(module) in inside and isinstance(module, (nn.Linear, Conv1D))
    }
    if not found:
        raise UserError(f"the blocks of {type(network).__name__} have no linear layers: use another network")
    if wrong := [pattern for pattern in patterns if not any(fnmatch.fnmatchcase(name, pattern) for name in found)]:
        raise UserError(f"{', '.join(wrong)} matches no linear layer, such as {', '.join(list(found)[:3])}")
    return {name: m for name, m in found.items() if not patterns or any(fnmatch.fnmatchcase(name, p) for p in patterns)}


def by_rows(module: nn.Linear, weight: Tensor) -> Tensor:
    """A view of a weight, or of a tensor of its shape, as (outputs, inputs)."""
    return weight.T if isinstance(module, Conv1D) else weight
