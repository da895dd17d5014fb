"""Faster decoding on CPUs: the tokens of plain `transformers`, whatever is recorded, shared or batched."""

import random
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from lm_lightning.generation import recording
from lm_lightning.generation.generation import answers
from lm_lightning.generation.sampling import Sampling

SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64},
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "max_position_embeddings": 64},
}


def made(kind: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES[kind], vocab_size=97, bos_token_id=None, eos_token_id=None)
    config.initializer_range = 0.3  # so that no two tokens are nearly equally probable
    network = AutoModelForCausalLM.from_config(config).eval()
    network.config.pad_token_id = None
    network.generation_config = GenerationConfig()
    return network


def plain(network: Any, prompt: list[int], size: int, ends: list[int]) -> list[int]:
    """The greedy continuation by `transformers`, of one prompt."""
    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": size, "do_sample": False, "eos_token_id": ends, "pad_token_id": 0}
    found = network.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()
    return found[:-1] if found[-1] in ends else found


def prompts(shared: int) -> list[list[int]]:
    """Three prompts of different lengths that begin with the same tokens."""
    draw = random.Random(1)
    start = [draw.randrange(97) for _ in range(shared)]
    return [start + [draw.randrange(97) for _ in range(size)] for size in (3, 9, 1)]


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("shared", [0, 20])
def test_tokens_are_those_of_transformers(kind: str, shared: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recording, "PATIENCE", 4)
    network, given = made(kind), prompts(shared)
    assert recording.supports(network) and bool(recording.shared_beginning(given)) == bool(shared)
    ends = [plain(network, given[0], 12, [96])[7], 96]  # the first text ends early
    expected = [plain(network, prompt, 12, ends) for prompt in given]
    assert len(expected[0]) < 12
    for _ in range(2):  # the second time, the step is recorded from the beginning
        assert answers(network, given, 12, Sampling(greedy=True), ends, None, None) == expected
    assert answers(network, given[:1], 12, Sampling(greedy=True), ends, None, None) == expected[:1]
    known = network._decoding_steps.known
    assert {rows: step.recorded is not None for (rows, _), step in known.items()} == {3: True, 1: True}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(parameter.roll(1, 0))
    changed = [plain(network, prompt, 12, ends) for prompt in given]
    assert changed != expected
    assert answers(network, given, 12, Sampling(greedy=True), ends, None, None) == changed


def test_samples_are_those_of_the_plain_loop():
    network, given = made("gpt2"), prompts(0)
    sampling = Sampling(temperature=0.7, top_k=20, top_p=0.9, seed=3)
    slow = answers(network, given, 12, sampling, [96], 90, None, fast=False)
    assert answers(network, given, 12, sampling, [96], 90, None) == slow
    assert answers(network, given[1:2], 12, sampling, [96], 90, None) == slow[1:2]


def test_networks_with_other_attention_or_weights_are_not_supported():
    window = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}
    config = AutoConfig.for_model("qwen2", **SIZES["llama"], **window, vocab_size=97)
    assert not recording.supports(AutoModelForCausalLM.from_config(config))
    config = AutoConfig.for_model("llama", **SIZES["llama"], vocab_size=97)
    assert recording.supports(AutoModelForCausalLM.from_config(config).eval())
    assert not recording.supports(AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval())
    assert not recording.supports(made("gpt2").to("meta"))
