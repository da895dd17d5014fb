"""Label smoothing as a second loss, see `losses.linear_losses`."""

from dataclasses import dataclass, replace
from typing import Optional

import torch
from torch import Tensor


@dataclass
class Smoothing:
    """Cross entropy with a uniform distribution over all tokens (Szegedy et al., 2016).

    Args:
        share: Fraction of the target that is distributed.
        vocab_size: Number of tokens; logits of further ones are padding.
    """

    share: float
    vocab_size: Optional[int] = None

    def prepared(self, dtype: torch.dtype, vocab_size: int) -> "Smoothing":
        return replace(self, vocab_size=vocab_size)

    def inputs(self, start: int, stop: int) -> Tensor:
        return torch.empty(stop - start, 0)

    def losses(self, logits: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        log_p = torch.log_softmax(logits[:, : self.vocab_size].float(), dim=1)
        slope = log_p.exp() - 1 / log_p.shape[1]
        return -log_p.mean(1, keepdim=True), slope
