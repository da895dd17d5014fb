"""LoRA: the base stays as it is, checkpoints are small, and what is exported is what was trained."""

import json
from pathlib import Path

import pytest
import torch
from conftest import paragraphs
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from lm_lightning.data.tokenizer import Tokenizer, train
from lm_lightning.errors import UserError

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

SIZES = {
    "gpt2": {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 64},
    "llama": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    "bert": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of small networks with their tokenizer."""
    result = {}
    for kind, sizes in SIZES.items():
        family, algorithm = ("bert", "wordpiece") if kind == "bert" else ("gpt", "bpe")
        tokenizer = train(Tokenizer(algorithm=algorithm, vocab_size=300), iter(paragraphs(50)), family)
        torch.manual_seed(0)
        auto = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
        own = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": tokenizer.pad_token_id}
        network = auto.from_config(AutoConfig.for_model(kind, **own, **sizes))
        with torch.no_grad():
            for parameter in network.parameters():  # biases are zero at first
                parameter.add_(0.02 * torch.randn_like(parameter))
        result[kind] = tmp_path_factory.mktemp(kind)
        network.save_pretrained(result[kind])
        tokenizer.save_pretrained(result[kind])
    return result


def flags(folder: Path, **lora: object) -> list[object]:
    settings = {"rank": 4, "dropout": 0.1} | lora
    weights = ["--model.network", "null", "--model.pretrained", folder, "--data.tokenizer.path", folder]
    return [*weights, *(f"--model.lora.{name}={value}" for name, value in settings.items())]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("base", ["whole", "int8", "nf4", "fp4"])
def test_try(fit, bases, kind, base):
    run = fit(*flags(bases[kind], base=base))
    print(*(p for p in run.rglob("*") if p.is_file()))
    print(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"].keys())
