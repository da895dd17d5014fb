"""Losses that need more care than a call of `torch.nn.functional`."""

from typing import Optional

import torch
from torch import Tensor

CHUNK_LOGITS = 1 << 26  # held at once: enough for large matrix products, little beside the gradients
SLICE_LOGITS = 1 << 20  # of these, a CPU does so many at a time, which stay in its cache between the passes


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Optional[Tensor], targets: Tensor, vocab_size: Optional[int] = None
) -> Tensor:
    """Cross entropy of a linear head, summed over the tokens, without ever holding all the logits.

    Logits are made for some rows at a time. Where gradients are needed, those of `hidden` and `weight` are computed
    from them at once, in the forward pass, so that nothing is computed twice and only the gradients are kept. The idea
    is that of Liger Kernel's fused linear cross entropy (Hsu et al., 2024, arXiv:2410.10989). Under autocast the
    products are computed in its dtype, the softmax and all sums over rows in float32.

    Args:
        hidden: Last hidden states, (N, H) float.
        weight: Head, (V, H) float.
        bias: Bias of the head, (V,) float, or None.
        targets: Right tokens, (N,) int64; -100 where there is none.
        vocab_size: Only the first so many rows of the head are tokens, the others are padding. Default: all V.

    Returns:
        Sum of -log p(target) over rows that have a target, in nats, () float32.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    if not torch.is_grad_enabled():  # which the function itself cannot know
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    with torch.autocast(device, enabled=False):  # the casts are made once, not for each chunk
        return _LinearCrossEntropy.apply(hidden, weight, bias, targets, vocab_size or len(weight), dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, vocab_size, dtype):
        train = any(ctx.needs_input_grad)
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        rows = max(1, CHUNK_LOGITS // len(weight))
        slice_rows = max(1, SLICE_LOGITS // len(weight)) if hidden.device.type == "cpu" else rows
        buffer = hidden.new_empty(min(rows, len(targets)), len(weight))
        for start in range(0, len(targets), rows):
            chunk = hidden[start : start + rows]
            logits = torch.mm(chunk, weight.T, out=buffer[: len(chunk)])
            logits[:, vocab_size:] = -torch.inf
            for part, target in zip(logits.split(slice_rows), targets[start : start + rows].split(slice_rows)):
                log_p = torch.log_softmax(part if bias is None else part + bias, dim=1, dtype=torch.float32)
                index = target.clamp(min=0).unsqueeze(1)
                absent = (target == -100).unsqueeze(1)
                total -= log_p.gather(1, index).masked_fill_(absent, 0).sum()
                if train:  # the gradient of the logits, softmax - one-hot, takes their place
                    gradient = log_p.exp_().scatter_add_(1, index, log_p.new_full(index.shape, -1))
                    part.copy_(gradient.masked_fill_(absent, 0))
            if grad_hidden is not None:
                grad_hidden[start : start + rows] = logits @ weight
            if grad_weight is not None:
                grad_weight += logits.T @ chunk
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=torch.float32)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx, grad_output):
        grad_hidden, grad_weight, grad_bias = (
            None if gradient is None else gradient * grad_output for gradient in ctx.saved_tensors
        )
        return grad_hidden, grad_weight, grad_bias, None, None, None
