"""Importance scores of weights, units and blocks, which determine what is removed.

They are measured with batches of training data (Wanda: Sun et al., 2023, arXiv:2306.11695; blocks: Men et al., 2024,
arXiv:2403.03853), by `compress` in a few passes through a trained model, and by `Pruning` during training.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, Optional

import torch
from torch import Tensor, nn

from lm_lightning.errors import UserError
from lm_lightning.linear_layers.blocks import by_rows

Pattern = Literal["free", "2:4"]
Add = Callable[[str, Tensor, int], None]  # (name, sum over the tokens of a batch, number of tokens)


def observe_inputs(layers: Mapping[str, nn.Module], add: Add, training_only: bool = False) -> list[Any]:
    """Registers hooks that measure the inputs of layers: their squares, summed over tokens, (inputs,) float32.

    Args:
        layers: Layers by their names.
        add: Called for each layer and batch.
        training_only: Whether passes in evaluation mode are ignored.

    Returns:
        Handles, to remove the hooks.
    """

    def hook_of(name: str) -> Any:
        @torch.no_grad()
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if layer.training or not training_only:
                tokens = inputs[0].detach().float().flatten(0, -2)
                add(name, tokens.square().sum(0), len(tokens))

        return hook

    return [layer.register_forward_pre_hook(hook_of(name)) for name, layer in layers.items()]


def observe_blocks(blocks: list[nn.Module], add: Add, training_only: bool = False) -> list[Any]:
    """Registers hooks that measure how much each block changes its input: 1 - cosine similarity, summed over tokens.

    Args:
        blocks: Blocks in order; the name of the first is `block 0`.
        add: Called for each block and batch, with a sum of shape ().
        training_only: Whether passes in evaluation mode are ignored.

    Returns:
        Handles, to remove the hooks.
    """

    def hook_of(name: str) -> Any:
        @torch.no_grad()
        def hook(block: nn.Module, inputs: tuple, output: Any) -> None:
            if block.training or not training_only:
                before, after = inputs[0], output[0] if isinstance(output, tuple) else output
                changes = 1 - torch.cosine_similarity(before.float(), after.float(), dim=-1)
                add(name, changes.sum(), changes.numel())

        return hook

    return [block.register_forward_hook(hook_of(f"block {number}")) for number, block in enumerate(blocks)]


def weight_scores(layer: nn.Linear, input_norms: Optional[Tensor] = None) -> Tensor:
    """The importance of each weight of a layer, (outputs, inputs) float32: its magnitude.

    Args:
        layer: A linear layer.
        input_norms: Norms of the inputs, (inputs,), by which the magnitudes are multiplied (Wanda). Default: 1.
    """
    magnitudes = by_rows(layer, layer.weight).abs().float()
    return magnitudes if input_norms is None else magnitudes * input_norms.to(magnitudes.device)


def least_important(scores: Tensor, share: float, pattern: Pattern = "free", within_outputs: bool = False) -> Tensor:
    """Which weights of a layer to set to zero, (outputs, inputs) bool.

    Args:
        scores: The importance of each weight, (outputs, inputs).
        share: The fraction of weights to set to zero, for the pattern `free`.
        pattern: `free`, or `2:4`: two of each four adjacent inputs.
        within_outputs: Whether weights are only compared within each output, not within the layer.
    """
    if pattern == "2:4":
        return smallest(scores.unflatten(1, (-1, 4)), 0.5).flatten(1)
    if within_outputs:
        return smallest(scores, share)
    return smallest(scores.flatten(), share).view_as(scores)


def check_pattern(pattern: Pattern, layers: Mapping[str, nn.Linear]) -> None:
    """Refuses layers whose number of inputs is not compatible with a pattern.

    Raises:
        UserError: Names the first such layer.
    """
    for name, layer in layers.items():
        inputs = by_rows(layer, layer.weight).shape[1]
        if pattern == "2:4" and inputs % 4:
            raise UserError(
                f"{name} has {inputs} inputs, but the pattern 2:4 needs a multiple of 4: choose others with modules"
            )


def smallest(scores: Tensor, share: float) -> Tensor:
    """A mask, bool, of the given fraction of elements in the last dimension, those with the smallest scores."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    number = round(share * scores.shape[-1])
    return chosen.scatter_(-1, scores.topk(number, dim=-1, largest=False, sorted=False).indices, True)
