"""What we need of networks beside their forward pass."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

from lm_lightning.networks import gradient_norm, positions

SIZES = {
    **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    **{"embedding_size": 16, "head_dim": 8, "num_key_value_heads": 2, "linear_units": 16, "ffn_dim": 16},
    **{"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "word_embed_proj_dim": 16, "rotary_dim": 4},
}
# Type of network, and how many positions it has where 20 are named; whether one token more fails, too.
POSITIONS = [
    *[(name, 20, True) for name in ("bert", "albert", "electra", "distilbert", "deberta", "convbert", "roformer")],
    *[(name, 20, True) for name in ("bart", "gpt2", "openai-gpt", "gptj", "opt", "mobilebert", "xlm")],
    *[(name, 18, True) for name in ("roberta", "camembert", "xlm-roberta", "data2vec-text", "mpnet", "esm")],
    *[(name, 18, True) for name in ("longformer", "roberta-prelayernorm", "ibert")],
    *[(name, 20, False) for name in ("modernbert", "llama", "qwen3", "gpt_neox")],  # rotary: untrained beyond it
    ("deberta-v2", 20, True),
    ("bloom", None, False),
    ("mpt", None, False),
]


@pytest.mark.parametrize(("model_type", "expected", "fails"), POSITIONS, ids=[row[0] for row in POSITIONS])
def test_positions_are_those_that_a_forward_pass_accepts(model_type: str, expected: int | None, fails: bool):
    """For every scheme: absolute, after the row of padding, after an offset, sinusoidal, rotary and ALiBi."""
    known = AutoConfig.for_model(model_type)
    names = {name: known.attribute_map.get(name, name) for name in (*SIZES, "max_position_embeddings")}
    sizes = {name: value for name, value in SIZES.items() if names[name] in known.to_dict()}
    limit = {"max_position_embeddings": 20} if expected else {}
    special = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    network = AutoModel.from_config(AutoConfig.for_model(model_type, vocab_size=30, **special, **limit, **sizes)).eval()
    assert positions(network) == expected

    def forward(length: int) -> None:
        with torch.no_grad():
            network(input_ids=torch.full((1, length), 5), attention_mask=torch.ones(1, length, dtype=torch.long))

    forward(expected or 40)
    if fails:
        with pytest.raises((IndexError, RuntimeError)):
            forward(expected + 1)


def test_gradient_norm_is_right_for_large_tensors():
    """PyTorch's own, on a CPU, is off by more than 1e-4 here."""
    generator = torch.Generator().manual_seed(1)
    parameters = [torch.zeros(20_000, 256), torch.zeros(7), torch.zeros(3, 4, 5)]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 1e-3
    expected = sum(p.grad.double().square().sum() for p in parameters).sqrt().item()
    assert abs(gradient_norm(parameters).item() / expected - 1) < 1e-6
