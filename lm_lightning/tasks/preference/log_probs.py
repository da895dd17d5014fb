"""Log-probabilities of single tokens by a linear head, without holding all logits in memory."""

from typing import Optional

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.tensor import DTensor

from lm_lightning.losses import CHUNK_LOGITS, log_softmax


def linear_log_probs(
    hidden: Tensor, weight: Tensor, bias: Optional[Tensor], targets: Tensor, vocab_size: int
) -> Tensor:
    """The log-probability of each target by a linear head.

    Logits are computed for some rows at a time, and again in the backward pass, where the weight of each token in the
    loss is known. Products are computed in autocast's dtype, the softmax in float32.

    Args:
        hidden: Last hidden states, (N, H) float; with a sharded head, the same on all its processes.
        weight: Head, (V, H) float; may be a DTensor with sharded rows.
        bias: Bias of the head, (V,) float, or None; sharded as the head is.
        targets: Tokens, (N,) int64.
        vocab_size: Number of tokens; further rows of the head are padding.

    Returns:
        (N,) float32, in nats.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    first, group = 0, None
    if isinstance(weight, DTensor):
        mesh, weight = weight.device_mesh, weight.to_local()
        bias = bias.to_local() if isinstance(bias, DTensor) else None
        first, group = mesh.get_local_rank() * len(weight), mesh.get_group()
    with torch.autocast(device, enabled=False):
        return _LinearLogProbs.apply(hidden, weight, bias, targets, vocab_size, dtype, first, group)


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, vocab_size, dtype, first, group):
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.settings = vocab_size, dtype, first, group
        found = hidden.new_zeros(len(targets), dtype=torch.float32)
        head, rows = weight.to(dtype), max(1, CHUNK_LOGITS // len(weight))
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            log_p = _log_p(hidden[part].to(dtype), head, bias, ctx.settings)
            index, elsewhere = _index(targets[part], first, len(weight))
            found[part] = log_p.gather(1, index).masked_fill_(elsewhere, 0).squeeze(1)
        if group is not None:
            torch.distributed.all_reduce(found, group=group)
        return found

    @staticmethod
    def backward(ctx, grad_output):
        hidden, weight, bias, targets = ctx.saved_tensors
        _, dtype, first, group = ctx.settings
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        head, rows = weight.to(dtype), max(1, CHUNK_LOGITS // len(weight))
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            chunk, slopes = hidden[part].to(dtype), grad_output[part].unsqueeze(1)
            index, elsewhere = _index(targets[part], first, len(weight))
            gradient = _log_p(chunk, head, bias, ctx.settings).exp_().mul_(-slopes)  # of the logits
            gradient.scatter_add_(1, index, slopes.masked_fill(elsewhere, 0))
            product = gradient.to(dtype)
            if grad_hidden is not None:
                grad_hidden[part] = product @ head
            if grad_weight is not None:
                grad_weight += product.T @ chunk
            if grad_bias is not None:
                grad_bias += gradient.sum(0)
        if group is not None and grad_hidden is not None:
            torch.distributed.all_reduce(grad_hidden, group=group)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def _log_p(hidden, weight, bias, settings):
    vocab_size, _, first, group = settings
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits[:, max(0, vocab_size - first) :] = -torch.inf
    return log_softmax(logits, group)


def _index(targets, first, rows):
    """The row of each target in this process's part of the head, and whether it is in that of another process."""
    index = (targets - first).unsqueeze(1)
    elsewhere = (index < 0) | (index >= rows)
    return index.clamp(0, rows - 1), elsewhere
