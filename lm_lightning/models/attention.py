"""Attention: short sequences in bfloat16 use matrix products on a CPU; checks of networks whose kernels need a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

LONGEST = 512  # tokens of a sequence; the probabilities of longer ones need too much memory
LARGEST = 1 << 25  # probabilities of a layer, which are kept for the backward pass


def choose(implementation: Optional[str]) -> None:
    """Makes networks with the attention `sdpa` use `attention`, unless an implementation is chosen by name.

    Without one, `sdpa` is the default of `transformers` for networks that have it.
    """
    transformers.AttentionInterface.register("sdpa", attention if implementation is None else sdpa_attention_forward)


def is_flash(network: transformers.PreTrainedModel) -> bool:
    """Whether a network uses one of the flash attentions of `transformers`."""
    return "flash" in (network.config._attn_implementation or "")


@contextmanager
def for_checks(network: transformers.PreTrainedModel) -> Iterator[None]:
    """Within this context, a new network can be called with a few tokens, whatever its attention is.

    Flash attention needs bfloat16, and a GPU, as does flex attention in training. A network that is not on a GPU yet,
    since it will be sharded, is called with another attention.
    """
    chosen = network.config._attn_implementation
    if network.device.type == "cuda":
        with torch.autocast("cuda", torch.bfloat16, enabled=is_flash(network)):
            yield
    elif is_flash(network) or chosen == "flex_attention":
        network.set_attn_implementation("eager")
        try:
            yield
        finally:
            network.set_attn_implementation(chosen)
    else:
        yield


def packed_inputs(input_ids: Tensor, position_ids: Tensor) -> dict[str, Any]:
    """The inputs of a network with flash attention, which separates documents only in a batch with a single row.

    Args:
        input_ids: (B, T) int64.
        position_ids: (B, T) int64, which restart from 0 at each document, and at each row.

    Returns:
        Both as (1, B * T), and where documents begin, which each layer would otherwise compute from the positions.
    """
    positions = position_ids.reshape(1, -1)
    starts = (positions[0] == 0).nonzero().flatten()
    bounds = nn.functional.pad(starts, (0, 1), value=positions.shape[1]).int()
    longest = position_ids.shape[1]
    lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    return {"input_ids": input_ids.reshape(1, -1), "position_ids": positions} | lengths


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Optional[Tensor],
    dropout: float = 0.0,
    scaling: Optional[float] = None,
    is_causal: Optional[bool] = None,
    **options: Any,
) -> tuple[Tensor, Optional[Tensor]]:
    """Scaled dot product attention of `transformers`.

    On a CPU, torch's fused kernel multiplies single rows. For bfloat16 and the lengths of small networks, batched
    matrix products are faster: 4 times at 128 tokens, 2.5 times at 512, forward and backward together. In float32 they
    are not, so that all other cases are passed on. As in the attention `eager` of `transformers`, scores are rounded
    to bfloat16 before the softmax.

    Args:
        module: The layer, which may say whether it `is_causal`.
        query: (batch, heads, Q, D).
        key: (batch, heads or fewer, K, D).
        value: Same shape as `key`.
        attention_mask: (batch or 1, heads or 1, Q, K): bool, true where a query may attend, or float, which is added to
            the scores; None for no mask, or only the causal one.
        dropout: Probability with which an attention probability becomes zero.
        scaling: Factor of the scores. Default: 1 / sqrt(D).
        is_causal: Whether queries attend only to earlier tokens, if there is no mask. Default: that of `module`.
        options: More arguments; with `position_bias` or `softcap`, the call is passed on.

    Returns:
        (batch, Q, heads, D), and None.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    more = any(options.get(name) is not None for name in ("position_bias", "softcap"))
    if more or not suits(query, key, causal):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **options
        )
    (batch, heads, length, size), keys = query.shape, key.shape[2]
    query, key, value = (
        repeat_kv(x, heads // x.shape[1]).to(torch.bfloat16).reshape(batch * heads, -1, x.shape[3])
        for x in (query, key, value)
    )
    bias = added_to_scores(attention_mask, causal, length, keys, query)
    bias = bias.expand(*bias.shape[:-2], length, keys)
    if bias.numel() > length * keys:  # else it is the same for all
        bias = bias.expand(batch, heads, length, keys).reshape(batch * heads, length, keys)
    scale = size**-0.5 if scaling is None else scaling
    scores = torch.baddbmm(bias.view(-1, length, keys), query, key.mT, alpha=scale)
    weights = nn.functional.dropout(torch.softmax(scores, 2), dropout, training=dropout > 0)
    output = torch.bmm(weights, value).view(batch, heads, length, value.shape[2])
    return output.transpose(1, 2).contiguous(), None


def suits(query: Tensor, key: Tensor, causal: bool) -> bool:
    """Whether matrix products are faster."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    if query.device.type != "cpu" or dtype != torch.bfloat16 or torch.compiler.is_exporting():
        return False  # (exported operations must not depend on the length)
    if not 1 < query.shape[2] <= LONGEST >= key.shape[2] or (causal and query.shape[2] != key.shape[2]):
        return False
    return len(query) == len(key) and query.shape[:3].numel() * key.shape[2] <= LARGEST


def added_to_scores(mask: Optional[Tensor], causal: bool, length: int, keys: int, like: Tensor) -> Tensor:
    """What a mask adds to the scores, in the data type of `like`: (1, Q, K) or of the shape of the mask."""
    if mask is not None and mask.dtype != torch.bool:
        return mask.clamp(min=torch.finfo(like.dtype).min).to(like.dtype)
    if mask is None:
        hidden = like.new_ones(length, keys, dtype=torch.bool)
        hidden = (hidden.triu(1) if causal else hidden.logical_not()).unsqueeze(0)
    else:
        hidden = mask.logical_not()
    # Not -inf, as the probabilities of a row without any key would not be numbers.
    return torch.zeros_like(hidden, dtype=like.dtype).masked_fill(hidden, torch.finfo(like.dtype).min)
