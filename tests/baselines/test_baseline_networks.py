"""Recurrent and convolutional networks: documents, padding, the state in generation, exports in a new process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import optional
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lm_lightning.baselines import networks  # noqa: F401 (registers them)

SETTINGS = {
    "awd_lstm": {"hidden_size": 16, "recurrent_size": 24, "num_hidden_layers": 2},
    "gated_cnn": {"hidden_size": 16, "num_hidden_layers": 2, "kernel_size": 3},
}
TOKENS = torch.arange(24).view(2, 12) * 7 % 50


@pytest.fixture(params=SETTINGS)
def network(request: pytest.FixtureRequest):
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, vocab_size=50, initializer_range=1.0, **SETTINGS[request.param])
    return AutoModelForCausalLM.from_config(config).eval()


def logits(network, tokens: Tensor, **inputs) -> Tensor:
    with torch.no_grad():
        return network(input_ids=tokens, **inputs).logits


def test_no_position_sees_the_future(network):
    before = logits(network, TOKENS)
    for place in range(12):
        changed = TOKENS.clone()
        changed[:, place] = 49
        after = logits(network, changed)
        assert torch.allclose(after[:, :place], before[:, :place], atol=1e-6)
        assert not torch.allclose(after[:, place], before[:, place], atol=1e-3)  # but it sees itself


@pytest.mark.parametrize("network", ["gated_cnn"], indirect=True)
def test_convolutions_see_as_many_tokens_as_documented(network):
    size = network.config.num_hidden_layers * (network.config.kernel_size - 1) + 1
    changed = TOKENS.clone()
    changed[:, 0] = 49
    same = torch.isclose(logits(network, changed), logits(network, TOKENS), atol=1e-6).all(2).all(0)
    assert same.tolist() == [False] * size + [True] * (12 - size)


def test_documents_of_a_block_are_read_as_if_each_were_alone(network):
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6], [0, 0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7]])
    found = logits(network, TOKENS, position_ids=positions)
    for row, start, end in ((0, 0, 5), (0, 5, 12), (1, 0, 1), (1, 1, 4), (1, 4, 12)):
        alone = logits(network, TOKENS[row : row + 1, start:end])
        assert torch.allclose(found[row, start:end], alone[0], atol=1e-5)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padding_changes_nothing(network, left: bool):
    rows = [TOKENS[0, :4], TOKENS[1, :9]]
    tokens, mask = torch.full((2, 12), 3), torch.zeros(2, 12, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(12 - len(row), 12) if left else slice(0, len(row))
        tokens[i, place], mask[i, place] = row, 1
    found = logits(network, tokens, attention_mask=mask)
    for i, row in enumerate(rows):
        assert torch.allclose(found[i, mask[i].bool()], logits(network, row.unsqueeze(0))[0], atol=1e-5)


def test_a_state_takes_the_place_of_what_was_read(network):
    mask = torch.ones_like(TOKENS[:, :7])
    mask[0, :3] = 0
    with torch.no_grad():
        first = network(input_ids=TOKENS[:, :7], attention_mask=mask, use_cache=True)
        second = network(input_ids=TOKENS[:, 7:], state=first.state, use_cache=True)
    full = torch.cat([mask, torch.ones(2, 5)], dim=1)
    expected = logits(network, TOKENS, attention_mask=full)
    assert torch.allclose(second.logits, expected[:, 7:], atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_the_same_with_and_without_a_state(network, beams: int):
    settings = {"max_new_tokens": 12, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(TOKENS[:, :5])
    mask[1, :3] = 0
    texts = [
        network.generate(input_ids=TOKENS[:, :5], attention_mask=mask, use_cache=cached, **settings).tolist()
        for cached in (True, False)
    ]
    assert texts[0] == texts[1]
    alone = network.generate(input_ids=TOKENS[1:, 3:5], attention_mask=mask[1:, 3:], **settings)
    assert alone[0].tolist() == texts[0][1][3:]


def test_generation_reads_each_token_once(network, monkeypatch: pytest.MonkeyPatch):
    read, body = [], network.body.forward
    monkeypatch.setattr(
        network.body, "forward", lambda tokens, *rest: (read.append(tokens.shape[1]), body(tokens, *rest))[1]
    )
    network.generate(input_ids=TOKENS[:, :5], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert read == [5, 1, 1, 1]


def test_dropout_of_weights_embeddings_and_units_only_in_training():
    torch.manual_seed(0)
    config = AutoConfig.for_model("awd_lstm", vocab_size=50, **SETTINGS["awd_lstm"])
    network = AutoModelForCausalLM.from_config(config)
    assert torch.equal(logits(network.eval(), TOKENS), logits(network, TOKENS))
    for name in ("embedding", "input", "layer", "output", "weight"):
        for other in ("embedding", "input", "layer", "output"):
            setattr(config, f"{other}_dropout", 0.5 if other == name else 0.0)
        for layer in network.body.layers:
            layer.weight_dropout = 0.5 if name == "weight" else 0.0
        network.train()
        assert not torch.allclose(logits(network, TOKENS), logits(network, TOKENS)), name
    from lm_lightning.baselines.network import locked_dropout

    kept = locked_dropout(torch.ones(3, 5, 8), 0.5, True)
    assert torch.equal(kept, kept[:, :1].expand_as(kept)) and set(kept.flatten().tolist()) == {0.0, 2.0}
    assert not torch.equal(kept[0], kept[1])


@pytest.fixture(scope="module", params=SETTINGS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def network_flag(kind: str) -> tuple[object, ...]:
    settings = {"model_type": kind} | SETTINGS[kind]
    return "--model.network", str(settings).replace("'", '"')


@pytest.mark.slow
def test_fit_with_documents_exports_and_generates(kind: str, fit, cli, tmp_path: Path):
    flags = (*network_flag(kind), "--data.mask_documents", True)
    full = fit(*flags)
    assert "bits_per_byte" in cli("validate", full)
    cli("export", full, "--output", tmp_path / "exported")
    script = (
        "import sys, torch, lm_lightning.baselines.networks\n"
        "from transformers import AutoModelForCausalLM\n"
        "network, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info\n"
        "print(network(torch.arange(9).unsqueeze(0)).logits.sum().item())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "exported"], capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    own = logits(AutoModelForCausalLM.from_pretrained(full / "model").eval(), torch.arange(9).unsqueeze(0)).sum()
    assert float(result.stdout) == pytest.approx(own.item(), abs=1e-4)
    optional("generation.generate.generate")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The old captain watched\nMy neighbour\n")
    outputs = [
        cli("generate", full, "--prompts_file", prompts, "--batch_size", size, "--max_new_tokens", 8) for size in (1, 2)
    ]
    assert outputs[0] == outputs[1] and outputs[0].count("\n") == 2
