"""Attention in bfloat16 on a CPU equals torch's in float32, for all kinds of masks."""

import pytest
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lm_lightning.models import attention


class Layer(nn.Module):
    is_causal = True


def inputs(length=20, keys=20, heads=2, dtype=torch.bfloat16):
    draw = torch.Generator().manual_seed(0)
    shapes = [(3, 4, length, 16), (3, heads, keys, 16), (3, heads, keys, 16)]
    return [torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in shapes]


def boolean(length=20, keys=20):
    mask = torch.rand(3, 1, length, keys, generator=torch.Generator().manual_seed(1)) > 0.5
    mask[..., 0] = True
    return mask


CASES = {
    "causal": {},
    "not causal": {"is_causal": False},
    "scaled": {"scaling": 0.5},
    "bool": {"attention_mask": boolean()},
    "float": {"attention_mask": torch.randn(1, 4, 20, 20)},
    "padding": {"attention_mask": boolean()[:1, :, :1]},
    "of each row": {"attention_mask": boolean()[:, :, :1]},
    "float32 minimum": {"attention_mask": torch.zeros(1, 1, 20, 20).masked_fill(boolean()[:1], -3.4e38)},
    "other keys": {"attention_mask": boolean(20, 30)},
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_float32(case, monkeypatch):
    calls = []
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *values, **options: calls.append(values))
    options = {"attention_mask": None, **CASES[case]}
    layer = Layer()
    layer.num_key_value_groups = 2
    values = inputs(keys=30 if case == "other keys" else 20)
    output, _ = attention.attention(layer, *values, **options)
    expected, _ = sdpa_attention_forward(layer, *(value.float() for value in values), **options)
    assert not calls and output.shape == expected.shape
    torch.testing.assert_close(output.float(), expected, atol=0.03, rtol=0.02)
    slope = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    gradients = torch.autograd.grad(output, values, slope)
    for own, other in zip(gradients, torch.autograd.grad(expected, values, slope.float())):
        torch.testing.assert_close(own.float(), other.float(), atol=0.06, rtol=0.02)


def test_probabilities_are_dropped_with_their_expectation():
    values = inputs()
    torch.manual_seed(0)
    runs = [attention.attention(Layer(), *values, None, dropout=0.3)[0] for _ in range(300)]
    expected = attention.attention(Layer(), *values, None)[0]
    assert (torch.stack(runs).float().mean(0) - expected.float()).abs().max() < 0.3 and not runs[0].equal(runs[1])


def test_a_query_without_any_key_has_a_finite_output():
    mask = boolean()
    mask[0, :, 3] = False
    output, _ = attention.attention(Layer(), *inputs(), mask)
    assert output.isfinite().all()


@pytest.mark.parametrize("settings", [{"dtype": torch.float32}, {"length": 1}, {"length": 520, "keys": 520}])
def test_other_cases_use_the_kernel_of_torch(settings):
    layer = Layer()
    layer.num_key_value_groups = 2
    values = inputs(**settings)
    own, other = attention.attention(layer, *values, None)[0], sdpa_attention_forward(layer, *values, None)[0]
    assert own.equal(other)


def test_a_chosen_implementation_is_that_of_transformers():
    try:
        attention.choose(None)
        assert AttentionInterface()["sdpa"] is attention.attention
        attention.choose("sdpa")
        assert AttentionInterface()["sdpa"] is sdpa_attention_forward
    finally:
        attention.choose("sdpa")
