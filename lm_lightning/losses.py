"""Losses that need more care than a call of `torch.nn.functional`."""

from typing import Optional

import torch
from torch import Tensor

# Logits held at once: enough rows to keep the matrix units busy, few enough to stay small beside the network.
CHUNK_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 27}


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
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, vocab_size or weight.shape[0], dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, vocab_size, dtype):
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = (
            torch.zeros_like(bias, dtype=torch.float32) if bias is not None and ctx.needs_input_grad[2] else None
        )
        rows = max(1, CHUNK_LOGITS.get(hidden.device.type, CHUNK_LOGITS["cuda"]) // weight.shape[0])
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(targets), rows):
                chunk, target = hidden[start : start + rows], targets[start : start + rows]
                logits = (chunk @ weight.T).float()
                if bias is not None:
                    logits += bias
                logits[:, vocab_size:] = -torch.inf
                present = target != -100
                index = target.clamp(min=0).unsqueeze(1)
                log_sum = logits.logsumexp(1, keepdim=True)
                total += ((log_sum - logits.gather(1, index)).squeeze(1) * present).sum()
                if not any(ctx.needs_input_grad):
                    continue
                # d loss / d logits = softmax - one-hot, in the place of the logits
                gradient = logits.sub_(log_sum).exp_()
                gradient.scatter_add_(1, index, gradient.new_full(index.shape, -1.0))
                gradient *= present.unsqueeze(1)
                if grad_bias is not None:
                    grad_bias += gradient.sum(0)
                gradient = gradient.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[start : start + rows] = gradient @ weight
                if grad_weight is not None:
                    grad_weight += gradient.T @ chunk
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx, grad_output):
        grad_hidden, grad_weight, grad_bias = (
            None if gradient is None else gradient * grad_output for gradient in ctx.saved_tensors
        )
        return grad_hidden, grad_weight, grad_bias, None, None, None
