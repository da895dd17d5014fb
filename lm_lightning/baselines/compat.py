"""transformers and torch: how `generate` passes on the state of a network, and the LSTM of torch without its module."""

from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


class PassesState:
    """Makes `generate` pass the `state` of a network's output on to its next call.

    Overrides private methods of `GenerationMixin`. Alternative: a subclass of `Cache`, whose interface consists of keys
    and values of attention, and whose name differs between versions (`past_key_values`, `cache`).
    """

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kw: Any):
        updated = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kw)  # type: ignore[misc]
        if (state := outputs.get("state")) is not None:
            updated["state"] = state
        return updated


def lstm(inputs: Tensor, lengths: Optional[Tensor], state: tuple[Tensor, Tensor], weights: list[Tensor], train: bool):
    """Calls a layer of an LSTM with weights that are not parameters, as those after weight dropout.

    Uses `torch.lstm`, which has no documentation. Alternative: `torch.nn.LSTM`, whose weights are parameters.

    Args:
        inputs: (B, T, I) float.
        lengths: Number of inputs of each row, (B,) int64 on the CPU; None for T.
        state: Hidden and cell state before the first input: (1, B, H) each.
        weights: weight_ih (4H, I), weight_hh (4H, H), bias_ih (4H,), bias_hh (4H,).
        train: Whether gradients are needed.

    Returns:
        Outputs, (B, T, H), 0 after the end of a row; hidden and cell state after the last input, (1, B, H) each.
    """
    settings = (weights, True, 1, 0.0, train, False)
    if lengths is None:
        outputs, hidden, cell = torch.lstm(inputs, state, *settings, True)
        return outputs, (hidden, cell)
    packed = torch.nn.utils.rnn.pack_padded_sequence(inputs, lengths, batch_first=True, enforce_sorted=False)
    order, back = packed.sorted_indices, packed.unsorted_indices
    assert order is not None and back is not None  # as sorting is not enforced
    state = (state[0].index_select(1, order), state[1].index_select(1, order))
    data, hidden, cell = torch.lstm(packed.data, packed.batch_sizes, state, *settings)
    outputs, _ = torch.nn.utils.rnn.pad_packed_sequence(
        PackedSequence(data, packed.batch_sizes, order, back), batch_first=True, total_length=inputs.shape[1]
    )
    return outputs, (hidden.index_select(1, back), cell.index_select(1, back))
