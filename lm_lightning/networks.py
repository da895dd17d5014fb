"""Functions for networks of `transformers`."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from transformers.modeling_layers import GradientCheckpointingLayer

from lm_lightning.errors import UserError

# Names in `transformers` of tables with a row for each absolute position.
POSITION_TABLES = ("position_embeddings", "embed_positions", "positions_embed", "position_embedding", "wpe")


@contextmanager
def headless(network: transformers.PreTrainedModel) -> Iterator[None]:
    """Within this context, the network returns the inputs of its head instead of logits."""
    head = network.get_output_embeddings()
    head.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del head.forward


def positions(network: Any) -> Optional[int]:
    """The number of tokens for which a network has positions; None if there is no limit.

    The config may state more than can be used: RoBERTa's positions begin after the row of the padding token (as in
    Longformer, MPNet, ESM, ...), and those of BART and OPT after an offset.

    Args:
        network: A network of `transformers`.
    """
    named = getattr(network.config, "max_position_embeddings", None)
    limits = [] if named is None else [named]
    for name, module in network.named_modules():
        table = getattr(module, "weight", None)
        if name.rpartition(".")[2] in POSITION_TABLES and isinstance(table, Tensor) and table.ndim == 2:
            padding = getattr(module, "padding_idx", None)
            limits.append(table.shape[0] - (getattr(module, "offset", 0) if padding is None else padding + 1))
    return min(limits, default=None)


def blocks(network: transformers.PreTrainedModel) -> list[nn.Module]:
    """The repeated layers of a network, which `transformers` marks by their class.

    Raises:
        UserError: If it has none.
    """
    found = [module for module in network.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not found:
        raise UserError(
            f"networks of type {network.config.model_type} have no layers that transformers marks as repeated: omit "
            "model.activation_checkpointing, and use --trainer.strategy ddp"
        )
    return found


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The global norm of the gradients, () float32, on all processes, however each of them is sharded."""
    kinds: dict[Any, list[Tensor]] = {}
    for gradient in (p.grad for p in parameters if p.grad is not None):
        mesh: Any = None
        placements: tuple = ()
        if isinstance(gradient, DTensor):
            if any(isinstance(placement, Partial) for placement in gradient.placements):  # still to be summed
                gradient = gradient.redistribute(placements=[Replicate()] * gradient.device_mesh.ndim)
            mesh, placements, gradient = gradient.device_mesh, gradient.placements, gradient.to_local()
        kinds.setdefault((mesh, placements), []).append(gradient)
    squares = []
    for (mesh, placements), gradients in kinds.items():
        square = local_norm(gradients).square()
        if mesh is not None:
            parts = [Replicate() if isinstance(placement, Replicate) else Partial() for placement in placements]
            square = DTensor.from_local(square, mesh, parts).full_tensor()
        squares.append(square)
    return torch.stack(squares).sum().sqrt()


def local_norm(tensors: list[Tensor]) -> Tensor:
    """The norm of all elements of some tensors, () float32."""
    if tensors[0].device.type != "cpu":
        return torch.nn.utils.get_total_norm(tensors)
    # On a CPU, PyTorch adds all squares of a tensor one after the other, which causes a relative error of 1e-4 for five
    # million elements. Row by row, there is none.
    norms = [torch.linalg.vector_norm(torch.linalg.vector_norm(tensor, dim=-1)) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms))


def add_end_tokens(network: transformers.PreTrainedModel, ends: Iterable[int]) -> None:
    """Makes tokens end the texts that a network generates, beside those that do already."""
    own = network.generation_config.eos_token_id
    more = own if isinstance(own, list) else [] if own is None else [own]
    network.generation_config.eos_token_id = list(dict.fromkeys([*ends, *more]))
