"""Segments: the parts of a batch that must not see each other, as rows of another batch.

A segment is a document, or what a block has of it, or a prompt without its padding. Recurrent and convolutional layers
have no mask for attention, so that each segment becomes a row of its own, which is padded on the right: nothing in a
causal network sees that padding.
"""

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor


@dataclass
class Segments:
    """Where the segments of a (B, T) batch are.

    Attributes:
        source: Index in the flattened batch of each position of the segments, (S, L) int64; 0 where there is none.
        target: Index in the flattened segments of each position of the batch, (B, T) int64; 0 for padding.
        lengths: Number of tokens of each segment, (S,) int64, on the CPU.
        last: Number of the last segment of each row of the batch, (B,) int64.
        real: Whether a position of the batch is a token, not padding, (B, T) bool.
    """

    source: Tensor
    target: Tensor
    lengths: Tensor
    last: Tensor
    real: Tensor

    def split(self, batch: Tensor) -> Tensor:
        """The segments, (S, L, ...), of a batch, (B, T, ...)."""
        return batch.flatten(0, 1)[self.source]

    def join(self, segments: Tensor) -> Tensor:
        """The batch, (B, T, ...), of segments, (S, L, ...); padding is 0."""
        batch = segments.flatten(0, 1)[self.target]
        return batch * self.real.reshape(*self.real.shape, *[1] * (batch.ndim - 2)).to(batch.dtype)


def find_segments(position_ids: Optional[Tensor], attention_mask: Optional[Tensor]) -> Optional[Segments]:
    """The segments of a batch; None if each row is one segment without padding.

    Args:
        position_ids: (B, T) int64: a segment begins where a position is not the previous one plus 1.
        attention_mask: (B, T): 0 for padding.

    Raises:
        ValueError: If a row consists of padding only.
    """
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None
    if position_ids is not None and bool((position_ids[:, 1:] == position_ids[:, :-1] + 1).all()):
        position_ids = None
    if position_ids is None and attention_mask is None:
        return None
    if attention_mask is None:
        assert position_ids is not None
        real = torch.ones_like(position_ids, dtype=torch.bool)
    else:
        real = attention_mask.bool()
        if not bool(real.any(1).all()):
            raise ValueError("a row of the batch consists of padding only")
    begins = beginnings(real, position_ids) & real
    number = begins.flatten().cumsum(0) - 1  # of the segment of each position
    index = torch.arange(number.numel(), device=number.device)
    first = index[begins.flatten()]
    chosen = real.flatten()
    place = index - first[number.clamp(min=0)]  # in the segment
    lengths = torch.bincount(number[chosen], minlength=len(first)).cpu()
    longest = int(lengths.max())
    target = torch.where(chosen, number * longest + place, 0)
    source = torch.zeros(len(first) * longest, dtype=torch.long, device=number.device)
    source[target[chosen]] = index[chosen]
    return Segments(
        source=source.view(len(first), longest),
        target=target.view(real.shape),
        lengths=lengths,
        last=number.view(real.shape)[:, -1],
        real=real,
    )


def beginnings(real: Tensor, position_ids: Optional[Tensor]) -> Tensor:
    """Whether a segment begins at each position, (B, T) bool; padding may have any value.

    Args:
        real: Whether a position is a token, not padding, (B, T) bool.
        position_ids: See `find_segments`; also (1, T).
    """
    begins = torch.ones_like(real)
    begins[:, 1:] = ~real[:, :-1]
    if position_ids is not None:
        begins[:, 1:] |= position_ids[:, 1:] != position_ids[:, :-1] + 1
    return begins


def places(input_ids: Tensor, position_ids: Optional[Tensor], attention_mask: Optional[Tensor]) -> Tensor:
    """The number of tokens before each position in its segment, (B, T) int64; see `find_segments`.

    Args:
        input_ids: (B, T) int64.
        position_ids: (B, T) or (1, T) int64, or None.
        attention_mask: (B, T), or None.
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    begins = beginnings(real, position_ids)
    index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(begins)
    return index - torch.where(begins, index, 0).cummax(1).values
