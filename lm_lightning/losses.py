"""Losses that need more care than a call of `torch.nn.functional`."""

from typing import Optional, Protocol

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

CHUNK_LOGITS = 1 << 26  # held at once: enough for large matrix products, but little compared to the gradients
LEAST = 1e-30  # probabilities below have fewer digits in float32
ADDED_ROWS = 1 << 11  # rows of the gradient of the head that are added at a time, to stay in the cache of a CPU
SLICE_LOGITS = 1 << 20  # processed at a time on a CPU, so that they stay in its cache between the passes


class SecondLoss(Protocol):
    """Another loss of the same logits, with which `linear_losses` mixes the cross entropy.

    Attributes:
        share: Its weight in the loss; that of the cross entropy is 1 - share.
    """

    share: float

    def prepared(self, dtype: torch.dtype, vocab_size: int) -> "SecondLoss":
        """A copy with its tensors in the data type of the logits, and only for tokens below `vocab_size`."""

    def inputs(self, start: int, stop: int) -> Tensor:
        """The values with which the logits of these rows are compared: (rows, ...)."""

    def losses(self, logits: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each row of (N, V) logits, (N, 1), and its gradient with respect to the first V': (N, V')."""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of (N, V) logits, summed over the rows with a target (not -100), () float32."""
    return F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Optional[Tensor], targets: Tensor, vocab_size: Optional[int] = None
) -> Tensor:
    """Cross entropy of a linear head, summed over the tokens, without holding all logits in memory at once.

    Logits are computed for some rows at a time. If gradients are needed, those of `hidden` and `weight` are computed
    from them already in the forward pass, so that nothing is computed twice and only the gradients are kept. This is
    the method of Liger Kernel's fused linear cross entropy (Hsu et al., 2024, arXiv:2410.10989). Under autocast the
    products are computed in its dtype, the softmax and all sums over rows in float32. If the rows of the head are
    sharded, each process computes the logits of its rows, and they exchange the maxima and sums of the softmax.

    Args:
        hidden: Last hidden states, (N, H) float; with a sharded head, the same on all its processes.
        weight: Head, (V, H) float; may be a DTensor with sharded rows.
        bias: Bias of the head, (V,) float, or None; sharded as the head is.
        targets: Correct tokens, (N,) int64; -100 for none.
        vocab_size: Number of tokens; further rows of the head are padding. Default: V.

    Returns:
        Sum of -log p(target) over rows that have a target, in nats, () float32.
    """
    return linear_losses(hidden, weight, bias, targets, vocab_size)[0]


def linear_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    targets: Tensor,
    vocab_size: Optional[int] = None,
    second: Optional[SecondLoss] = None,
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` mixed with a second loss of the same logits; with one, the head must not be sharded.

    Returns:
        The mixed loss, and the second loss alone, without gradients; both summed over the rows that have a target,
        () float32.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    vocab_size, first, group = vocab_size or len(weight), 0, None
    if isinstance(weight, DTensor):
        mesh, weight = weight.device_mesh, weight.to_local()
        bias = bias.to_local() if isinstance(bias, DTensor) else None
        first, group = mesh.get_local_rank() * len(weight), mesh.get_group()
    if not torch.is_grad_enabled():  # an autograd function cannot know this itself
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    if second is not None:
        second = second.prepared(dtype, vocab_size)
    with torch.autocast(device, enabled=False):  # the casts are made once, not for each chunk
        return _LinearLoss.apply(hidden, weight, bias, targets, vocab_size, dtype, first, group, second)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, vocab_size, dtype, first, group, second):
        train = any(ctx.needs_input_grad)
        total = hidden.new_zeros((), dtype=torch.float32)
        second_total = total.clone()
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        rows = max(1, CHUNK_LOGITS // len(weight))
        slice_rows = max(1, SLICE_LOGITS // len(weight)) if hidden.device.type == "cpu" and group is None else rows
        buffer = hidden.new_empty(min(rows, len(targets)), len(weight))
        fast = hidden.device.type == "cpu" and group is None and (second is None or second.share == 0)
        softmax = hidden.new_empty(min(slice_rows, len(buffer)) if fast else 0, len(weight), dtype=torch.float32)
        for start in range(0, len(targets), rows):
            chunk = hidden[start : start + rows]
            logits = torch.mm(chunk, weight.T, out=buffer[: len(chunk)])
            logits[:, max(0, vocab_size - first) :] = -torch.inf
            inputs = logits[:, :0] if second is None else second.inputs(start, start + rows)
            parts = (logits, targets[start : start + rows], inputs)
            for part, target, second_part in zip(*(tensor.split(slice_rows) for tensor in parts)):
                scores = part if bias is None or (fast and second is None) else part + bias
                missing = (target == -100).unsqueeze(1)
                if second is not None:
                    values, slope = second.losses(scores, second_part)
                    second_total += values.masked_fill_(missing, 0).sum()
                if fast:
                    total += softmax_loss(part, target, bias, softmax[: len(part)], train)
                    if grad_bias is not None:
                        grad_bias += softmax[: len(part)].sum(0)
                    continue
                log_p = log_softmax(scores, group)
                index = (target - first).unsqueeze(1)
                elsewhere = (index < 0) | (index >= len(weight))  # no target, or in the rows of another process
                index = index.clamp_(0, len(weight) - 1)
                total -= log_p.gather(1, index).masked_fill_(elsewhere, 0).sum()
                if train:  # the gradient of the logits, softmax - one-hot, takes their place
                    one = log_p.new_full(index.shape, -1).masked_fill_(elsewhere, 0)
                    gradient = log_p.exp_().scatter_add_(1, index, one)
                    if second is not None:
                        gradient *= 1 - second.share
                        gradient[:, : slope.shape[1]].add_(slope, alpha=second.share)
                    part.copy_(gradient.masked_fill_(missing, 0))
            if grad_hidden is not None:
                grad_hidden[start : start + rows] = logits @ weight
            if grad_weight is not None:
                for sums, part in zip(grad_weight.split(ADDED_ROWS), (logits.T @ chunk).split(ADDED_ROWS)):
                    sums += part
            if grad_bias is not None and not fast:
                grad_bias += logits.sum(0, dtype=torch.float32)
        if group is not None:
            torch.distributed.all_reduce(total, group=group)
            if grad_hidden is not None:
                torch.distributed.all_reduce(grad_hidden, group=group)
        if second is not None:
            total = (1 - second.share) * total + second.share * second_total
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.mark_non_differentiable(second_total)
        return total, second_total

    @staticmethod
    def backward(ctx, grad_output, _):
        grad_hidden, grad_weight, grad_bias = (
            None if gradient is None else gradient * grad_output for gradient in ctx.saved_tensors
        )
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None


def softmax_loss(logits: Tensor, targets: Tensor, bias: Optional[Tensor], buffer: Tensor, train: bool) -> Tensor:
    """The loss of some rows on a CPU, and its gradient, with as few passes over the logits as possible.

    Args:
        logits: (N, V); if `train`, replaced by the gradient with respect to them.
        targets: (N,) int64, -100 for none.
        bias: Added to the logits, (V,), or None.
        buffer: (N, V) float32; if `train`, the gradient in float32 is written to it.
        train: Whether the gradient is needed.

    Returns:
        The sum of the losses, () float32.
    """
    buffer.copy_(logits)
    if bias is not None:
        buffer += bias
    index = targets.unsqueeze(1)
    none = (index < 0) | (index >= logits.shape[1])
    index = index.clamp(0, logits.shape[1] - 1)
    torch.softmax(buffer, 1, out=buffer)
    p = buffer.gather(1, index)
    log_p = p.log()
    if (p < LEAST).any():  # its logarithm is not exact
        scores = logits.float() if bias is None else logits.float() + bias
        log_p = torch.where(p < LEAST, torch.log_softmax(scores, 1, torch.float32).gather(1, index), log_p)
    if train:
        buffer.scatter_(1, index, torch.where(none, p, p - 1))
        if (missing := targets == -100).any():
            buffer[missing] = 0
        logits.copy_(buffer)
    return -log_p.masked_fill_(none, 0).sum()


def log_softmax(logits: Tensor, group: Optional[torch.distributed.ProcessGroup]) -> Tensor:
    """Log-softmax over the second dimension of (N, V) logits, float32; each process of the group has some columns."""
    if group is None:
        return torch.log_softmax(logits, dim=1, dtype=torch.float32)
    logits = logits.float()
    largest = logits.amax(1, keepdim=True)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group)
    logits = logits - largest
    total = logits.exp().sum(1, keepdim=True)
    torch.distributed.all_reduce(total, group=group)
    return logits - total.log()
