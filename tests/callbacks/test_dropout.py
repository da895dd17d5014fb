"""NoDropout: a network in training mode that draws nothing."""

from types import SimpleNamespace

import pytest
import torch
import transformers

from lm_lightning.callbacks.dropout import NoDropout

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
NETWORKS = {
    "gpt2": SMALL,
    "bert": SMALL | {"intermediate_size": 32},
    "llama": SMALL | {"intermediate_size": 32, "attention_dropout": 0.5},
    "modernbert": SMALL
    | {"intermediate_size": 32, "attention_dropout": 0.5, "embedding_dropout": 0.5, "mlp_dropout": 0.5}
    | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    "opt": SMALL | {"ffn_dim": 32, "word_embed_proj_dim": 32, "layerdrop": 0.5, "attention_dropout": 0.5},
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_training_forward_passes_are_equal(kind: str, attention: str):
    config = transformers.AutoConfig.for_model(kind, **NETWORKS[kind])
    masked = kind.endswith("bert")
    auto_class = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    network = auto_class.from_config(config, attn_implementation=attention).train()
    tokens = torch.arange(3, 35).unsqueeze(0)
    first, *others = (network(tokens).logits for _ in range(10))
    assert not all(torch.equal(first, other) for other in others)
    NoDropout().on_fit_start(None, SimpleNamespace(network=network))
    assert network.training and torch.equal(network(tokens).logits, network(tokens).logits)
