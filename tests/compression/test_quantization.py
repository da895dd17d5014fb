"""Quantization at the end of a training: a small model is there, and the one that was trained for."""

import csv
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import needs, paragraphs
from processes import Runs
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from lm_lightning.compression import formats, recipes
from lm_lightning.compression.callbacks.quantization import rounded
from lm_lightning.compression.folder import load
from lm_lightning.data.tokenizer import Tokenizer, train
from lm_lightning.errors import UserError
from lm_lightning.linear_layers.blocks import by_rows, linear_layers

NETWORKS = {
    "gpt2": {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 64},
    "llama": {
        "model_type": "llama",
        **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
        "max_position_embeddings": 64,
    },
}


def options(kind: str = "gpt2", **values: object) -> list[str]:
    flags = [f"--trainer.callbacks.{name}={value}" for name, value in ({"table": "false"} | values).items()]
    return ["--trainer.callbacks+=Quantization", *flags, "--model.network", json.dumps(NETWORKS[kind])]


def losses(run: Path, column: str) -> list[float]:
    with open(run / "metrics.csv", newline="") as file:
        return [float(row[column]) for row in csv.DictReader(file) if row.get(column)]


def made(kind: str, folder: Path) -> torch.nn.Module:
    """A network, which is left in a folder, too."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(vocab_size=300, **NETWORKS[kind])).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    network.save_pretrained(folder)
    train(Tokenizer(vocab_size=300), iter(paragraphs(50)), "gpt").save_pretrained(folder)
    return network


@pytest.mark.parametrize(
    ("kind", "method"),
    [("llama", "int8"), ("llama", "int8-weights"), ("gpt2", "bnb-int8"), ("gpt2", "nf4"), ("llama", "fp4")],
)
def test_rounded_layer_computes_what_the_quantized_one_does(kind: str, method: str, tmp_path: Path):
    network = made(kind, tmp_path / "whole")
    recipes.compress(tmp_path / "whole", method, tmp_path / "quantized")
    quantized = linear_layers(load(tmp_path / "quantized"))
    rounding = recipes.STEPS[method].method.rounding()
    for name, layer in linear_layers(network).items():
        inputs = torch.randn(2, 12, by_rows(layer, layer.weight).shape[1])
        inputs[0, 3, 5] = 8  # bitsandbytes has a way of its own with those above 6
        with torch.no_grad():
            own, other, whole = rounded(layer, rounding, inputs), quantized[name](inputs), layer(inputs)
        assert (own - other).abs().max() < 0.1 * (whole - other).abs().max()  # (4 bits are multiplied in bf16)


@pytest.mark.skipif(torch.__version__ < (2, 10), reason="torch 2.9 cannot trace networks of transformers")
@pytest.mark.slow
def test_rounded_network_computes_what_onnxruntime_does(tmp_path: Path):
    network = made("gpt2", tmp_path / "whole")
    recipes.compress(tmp_path / "whole", "onnx-int8", tmp_path / "quantized")
    run, tokens = formats.runner(tmp_path / "quantized"), torch.arange(5, 29).view(2, 12)
    with torch.no_grad():
        whole, quantized = network(tokens).logits, run(input_ids=tokens)["logits"]
        for layer in linear_layers(network).values():
            layer.forward = partial(rounded, layer, recipes.STEPS["onnx-int8"].method.rounding())
        own = network(tokens).logits
    assert (own - quantized).abs().mean() < 0.5 * (whole - quantized).abs().mean()


@pytest.mark.slow
def test_run_ends_with_a_quantized_model_and_its_measures(fit):
    """The last validation is of the network as it was trained, which is what the table finds."""
    run = fit(*options(recipe="nf4", start=4, table="true"))
    with open(run / "compressed" / "compression.csv", newline="") as file:
        none, quantized = csv.DictReader(file)
    own, told = float(quantized["loss"]), losses(run, "val/loss")[-1]
    assert quantized["recipe"] == "nf4" and float(quantized["layers"]) < 0.16 * float(none["layers"])
    assert told == pytest.approx(own, abs=1e-3) and own != float(none["loss"])
    assert (run / "compressed" / "compression.png").is_file()
    # What is exported beside it is whole, and quantized no further.
    weights = load_file(run / "model" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert AutoModelForCausalLM.from_pretrained(run / "compressed" / "nf4").config.quantization_config


@pytest.mark.slow
def test_training_rounds_from_the_start_on(fit):
    plain = fit("--model.network", json.dumps(NETWORKS["gpt2"]))
    own = fit(*options(recipe="fp4", start=4))
    same = [a == b for a, b in zip(losses(plain, "train/loss"), losses(own, "train/loss"), strict=True)]
    assert same == [True] * 4 + [False] * 6
    assert (own / "compressed" / "fp4" / "config.json").is_file()
    assert not (own / "compressed" / "compression.md").exists()  # nothing was measured


@pytest.mark.slow
def test_resumed_run_goes_on_exactly_and_is_quantized_once(fit, recipe: Path):
    flags = options(recipe="nf4", start=3)
    whole = fit(*flags, "--name", "whole")
    with pytest.raises(RuntimeError, match="power failure"):
        fit(
            *flags,
            *("--trainer.callbacks+=test_fit.Stop", "--trainer.callbacks.step", 7),
            *("--name", "part"),
        )
    part = fit(*flags, "--name", "part", "--ckpt_path", "last")
    for folder in ("model", "compressed/nf4"):
        first, second = (load_file(run / folder / "model.safetensors") for run in (whole, part))
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert losses(whole, "val/loss")[-1] == losses(part, "val/loss")[-1]


def test_only_the_named_layers_are_quantized(fit):
    run = fit(*options(recipe="nf4", modules='["*.mlp.*"]'))
    weights = load_file(run / "compressed" / "nf4" / "model.safetensors")
    assert all((w.dtype == torch.uint8) == (".mlp." in n) for n, w in weights.items() if n.endswith("c_proj.weight"))


@needs("sharding")
@pytest.mark.slow
def test_strategies_round_alike(fit, recipe: Path, tmp_path: Path):
    """Two processes as one, also where each has a part of each weight."""
    runs = Runs(tmp_path / "processes")
    runs.folder.mkdir()
    network = NETWORKS["gpt2"] | {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    flags = (*options(recipe="nf4", start=2), "--model.network", json.dumps(network))
    one = losses(fit(*flags), "train/loss")
    flags = ("fit", "--config", recipe, *flags)
    two = ("--trainer.devices", 2, "--data.batch_size", 2)
    runs(
        {
            "ddp": (*flags, *two, "--trainer.strategy", "ddp"),
            "fsdp2": (*flags, *two, "--trainer.strategy", "fsdp2"),
        }
    )
    for name in ("ddp", "fsdp2"):
        assert losses(runs.folder / name, "train/loss") == pytest.approx(one, abs=1e-3)
        assert (runs.folder / name / "compressed" / "nf4" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("kind", "values", "flags", "message"),
    [
        ("gpt2", {"recipe": "int9"}, (), "there is no recipe 'int9'"),
        ("gpt2", {"recipe": "int8"}, (), "skips 8 of 8 linear layers of GPT2LMHeadModel.*Conv1D"),
        ("gpt2", {"recipe": "nf4", "start": 10}, (), "starts at step 10, but the run ends at step 10: lower its start"),
        ("gpt2", {"recipe": "nf4", "start": -1}, (), "start is -1"),
        ("gpt2", {"recipe": "sparse", "start": 0}, (), "cannot train for the recipe sparse: .* one of int8, .*nf4"),
        ("gpt2", {"recipe": "width=0.5+nf4", "start": 0}, (), "cannot train for the recipe width=0.5"),
        ("gpt2", {"recipe": "onnx", "start": 0}, (), "cannot train for the recipe onnx"),
        ("gpt2", {"recipe": "nf4", "start": 0}, ("--model.compile", "true"), "cannot be combined with model.compile"),
        ("gpt2", {"recipe": "nf4", "modules": '["*none*"]'}, (), r"\*none\* matches no linear layer"),
        ("gpt2", {"recipe": "heads"}, (), "transformers cannot load a GPT2LMHeadModel with fewer heads"),
    ],
)
def test_impossible_quantizations_are_refused_before_any_step(fit, kind, values, flags, message: str):
    with pytest.raises(UserError, match=message):
        fit(*options(kind, **values), *flags, "--trainer.callbacks+=test_fit.Stop", "--trainer.callbacks.step", 1)
