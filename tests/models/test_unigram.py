import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from lm_lightning.models.unigram import start_at_frequencies

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 64}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0}
COUNTS = np.random.default_rng(0).integers(0, 10_000, 50)  # of 50 tokens, the other rows are padding


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_gpt_predicts_the_frequencies_of_tokens(tied):
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(GPT2Config(**SIZES, **SPECIAL, tie_word_embeddings=tied)).eval()
    before = copy.deepcopy(network)
    tokens = torch.randint(50, (2, 8))
    assert start_at_frequencies(network, COUNTS)
    logits, old = network(tokens).logits[..., :50], before(tokens).logits[..., :50]
    frequencies = torch.from_numpy((COUNTS + 1.0) / (COUNTS + 1.0).sum()).float()
    expected = torch.softmax(old + frequencies.log(), -1)  # what it knew of the context, which is nothing, is kept
    torch.testing.assert_close(torch.softmax(logits, -1), expected, rtol=1e-3, atol=1e-6)
    assert (network.get_input_embeddings().weight is network.get_output_embeddings().weight) == tied


def test_a_network_without_such_a_bias_is_not_changed():
    network = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, **SPECIAL, intermediate_size=24))
    before = copy.deepcopy(network.state_dict())
    assert not start_at_frequencies(network, COUNTS)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
