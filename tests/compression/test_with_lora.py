"""Compression of runs with LoRA, where the project has both."""

import csv
from pathlib import Path

import pytest
import torch
from conftest import needs, paragraphs
from transformers import AutoConfig, AutoModelForCausalLM

from lm_lightning.data.tokenizer import Tokenizer, train
from lm_lightning.errors import UserError

pytestmark = needs("lora")


@pytest.fixture
def flags(tmp_path: Path) -> list[object]:
    """Flags that train LoRA on a small pretrained network."""
    base = tmp_path / "base"
    tokenizer = train(Tokenizer(algorithm="bpe", vocab_size=300), iter(paragraphs(50)), "gpt")
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 64, "vocab_size": 300}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes, **ends)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    weights = ["--model.network", "null", "--model.pretrained", base, "--data.tokenizer.path", base]
    return [*weights, "--model.adapter", "LoRA", "--model.adapter.rank", 4]


@pytest.mark.slow
def test_the_sum_of_base_and_adapters_is_compressed(fit, cli, flags: list):
    """And not measured with adapters beside it once more."""
    run = fit(*flags)
    cli("compress", run, "--recipe", "sparse=0.01", "--seconds", 0.05, "--tokens", 16)
    with open(run / "compressed" / "compression.csv", newline="") as file:
        none, sparse = csv.DictReader(file)
    with open(run / "metrics.csv", newline="") as file:
        trained = [float(row["val/loss"]) for row in csv.DictReader(file) if row.get("val/loss")]
    assert float(none["loss"]) == pytest.approx(trained[-1], abs=1e-4)
    assert float(sparse["loss"]) == pytest.approx(trained[-1], abs=0.01)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (["--trainer.callbacks+=Pruning"], "pruning changes the weights that model.adapter freezes"),
        (
            ["--trainer.callbacks+=Quantization", "--trainer.callbacks.recipe=nf4", "--trainer.callbacks.start=0"],
            "cannot round the output of model.adapter",
        ),
    ],
)
def test_callbacks_that_change_the_weights_are_refused(fit, flags: list, callback: list, message: str):
    with pytest.raises(UserError, match=message):
        fit(*flags, *callback)
