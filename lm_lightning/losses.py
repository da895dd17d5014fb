"""Losses that need more care than a call of `torch.nn.functional`."""

from typing import Optional

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.tensor import DTensor

CHUNK_LOGITS = 1 << 26  # held at once: enough for large matrix products, little beside the gradients
SLICE_LOGITS = 1 << 20  # of these, a CPU does so many at a time, which stay in its cache between the passes


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Optional[Tensor], targets: Tensor, vocab_size: Optional[int] = None
) -> Tensor:
    """Cross entropy of a linear head, summed over the tokens, without ever holding all the logits.

    Logits are made for some rows at a time. Where gradients are needed, those of `hidden` and `weight` are computed
    from them at once, in the forward pass, so that nothing is computed twice and only the gradients are kept. The idea
    is that of Liger Kernel's fused linear cross entropy (Hsu et al., 2024, arXiv:2410.10989). Under autocast the
    products are computed in its dtype, the softmax and all sums over rows in float32. If the rows of the head are
    sharded, each process computes the logits of its rows, and they exchange what the softmax needs of them.

    Args:
        hidden: Last hidden states, (N, H) float; with a sharded head, the same on all its processes.
        weight: Head, (V, H) float; may be a DTensor with sharded rows.
        bias: Bias of the head, (V,) float, or None; sharded as the head is.
        targets: Right tokens, (N,) int64; -100 where there is none.
        vocab_size: Only the first so many rows of the head are tokens, the others are padding. Default: all V.

    Returns:
        Sum of -log p(target) over rows that have a target, in nats, () float32.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    vocab_size, first, group = vocab_size or len(weight), 0, None
    if isinstance(weight, DTensor):
        mesh, weight = weight.device_mesh, weight.to_local()
        bias = None if bias is None else bias.to_local()
        first, group = mesh.get_local_rank() * len(weight), mesh.get_group()
    if not torch.is_grad_enabled():  # which the function itself cannot know
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    with torch.autocast(device, enabled=False):  # the casts are made once, not for each chunk
        return _LinearCrossEntropy.apply(hidden, weight, bias, targets, vocab_size, dtype, first, group)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, vocab_size, dtype, first, group):
        train = any(ctx.needs_input_grad)
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        rows = max(1, CHUNK_LOGITS // len(weight))
        slice_rows = max(1, SLICE_LOGITS // len(weight)) if hidden.device.type == "cpu" and group is None else rows
        buffer = hidden.new_empty(min(rows, len(targets)), len(weight))
        for start in range(0, len(targets), rows):
            chunk = hidden[start : start + rows]
            logits = torch.mm(chunk, weight.T, out=buffer[: len(chunk)])
            logits[:, max(0, vocab_size - first) :] = -torch.inf
            for part, target in zip(logits.split(slice_rows), targets[start : start + rows].split(slice_rows)):
                log_p = log_softmax(part if bias is None else part + bias, group)
                index = (target - first).unsqueeze(1)
                elsewhere = (index < 0) | (index >= len(weight))  # no target, or in the rows of another process
                index = index.clamp_(0, len(weight) - 1)
                total -= log_p.gather(1, index).masked_fill_(elsewhere, 0).sum()
                if train:  # the gradient of the logits, softmax - one-hot, takes their place
                    one = log_p.new_full(index.shape, -1).masked_fill_(elsewhere, 0)
                    gradient = log_p.exp_().scatter_add_(1, index, one)
                    part.copy_(gradient.masked_fill_((target == -100).unsqueeze(1), 0))
            if grad_hidden is not None:
                grad_hidden[start : start + rows] = logits @ weight
            if grad_weight is not None:
                grad_weight += logits.T @ chunk
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=torch.float32)
        if group is not None:
            torch.distributed.all_reduce(total, group=group)
            if grad_hidden is not None:
                torch.distributed.all_reduce(grad_hidden, group=group)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx, grad_output):
        grad_hidden, grad_weight, grad_bias = (
            None if gradient is None else gradient * grad_output for gradient in ctx.saved_tensors
        )
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def log_softmax(logits: Tensor, group: Optional[torch.distributed.ProcessGroup]) -> Tensor:
    """Log-softmax over the second dimension of (N, V) logits, in float32, of which each process of a group has some."""
    if group is None:
        return torch.log_softmax(logits, dim=1, dtype=torch.float32)
    logits = logits.float()
    largest = logits.amax(1, keepdim=True)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group)
    logits = logits - largest
    total = logits.exp().sum(1, keepdim=True)
    torch.distributed.all_reduce(total, group=group)
    return logits - total.log()
