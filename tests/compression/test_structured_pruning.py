"""Structured pruning: what is exported is really smaller, and computes what the masked network did."""

import csv
import json
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from forks import python
from processes import Runs
from safetensors.torch import load_file

from lm_lightning.errors import UserError

NETWORKS = {
    "gpt2": {"model_type": "gpt2", "n_layer": 4, "n_embd": 32, "n_head": 2, "n_positions": 64},
    "llama": {
        "model_type": "llama",
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    },
    "bert": {
        "model_type": "bert",
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        "max_position_embeddings": 64,
    },
}


def options(network: str, **values: object) -> list[str]:
    flags = [f"--trainer.callbacks.{name}={value}" for name, value in ({"table": "false"} | values).items()]
    return ["--trainer.callbacks+=StructuredPruning", *flags, "--model.network", json.dumps(NETWORKS[network])]


def last(run: Path) -> torch.nn.Module:
    """The network of a run's last checkpoint, of the size that it was trained in."""
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)

    network_class = getattr(transformers, saved["network"]["class"])
    settings = network_class.config_class.from_dict(saved["network"]["config"])
    settings.vocab_size = saved["network"]["rows"]
    network = network_class(settings).eval()
    network.load_state_dict({k.removeprefix("network."): w for k, w in saved["state_dict"].items() if "network." in k})
    return network


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "values", "settings"),
    [
        ("gpt2", {"kind": "width", "method": "magnitude"}, {"n_inner": 64}),
        ("llama", {"kind": "width", "keep": 0.25}, {"intermediate_size": 16}),
        ("bert", {"kind": "width"}, {"intermediate_size": 32}),
        ("llama", {"kind": "heads"}, {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}),
        ("gpt2", {"kind": "layers"}, {"n_layer": 2}),
        ("llama", {"kind": "layers", "keep": 0.75}, {"num_hidden_layers": 3}),
    ],
)
def test_exported_model_is_smaller_and_computes_the_same(
    fit, cli, masked: tuple, network: str, values: dict, settings: dict, tmp_path
):
    run = fit(*(masked if network == "bert" else ()), *options(network, **values, frequency=2, end=6))
    whole = last(run)
    cli("export", run, "--output", tmp_path / "again")  # from the checkpoint
    for folder in (run / "model", tmp_path / "again"):
        small = type(whole).from_pretrained(folder).eval()
        assert {name: getattr(small.config, name) for name in settings} == settings
        assert small.num_parameters() < whole.num_parameters()
        tokens = torch.arange(5, 29).view(2, 12)
        with torch.no_grad():
            own, right = small(tokens).logits, whole(tokens).logits
        assert torch.allclose(own, right[..., : own.shape[-1]], atol=1e-5)


def test_what_is_gone_stays_gone_and_the_rest_is_what_matters(fit):
    """By weights alone: of units with the smallest weights in and out, none is kept."""
    run = fit(*options("gpt2", kind="width", method="magnitude", end=0))
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    (state,) = [state for name, state in saved["callbacks"].items() if "StructuredPruning" in name]
    for number, kept in enumerate(state["kept"]):
        down = saved["state_dict"][f"network.transformer.h.{number}.mlp.c_proj.weight"]
        assert len(kept) == 64 and kept.tolist() == (down != 0).any(1).nonzero().flatten().tolist()


def test_share_grows_along_the_schedule(fit, cli, recipe: Path):
    out = cli("fit", "--config", recipe, *options("gpt2", keep=0.5, start=2, end=8, frequency=2))
    run = Path(out.split("run folder: ")[1].splitlines()[0])
    with open(run / "metrics.csv", newline="") as file:
        shares = [float(row["train/sparsity"]) for row in csv.DictReader(file) if row.get("train/sparsity")]
    assert sorted(set(shares)) == pytest.approx([0.5 * (1 - (1 - part) ** 3) for part in (0, 1 / 3, 2 / 3, 1)])
    assert "pruned: 64 of 128 units of each block are kept (50.0%)" in out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["width", "layers"])
def test_resumed_run_goes_on_exactly(fit, kind: str):
    flags = options("llama", kind=kind, end=10, frequency=2)
    whole = fit(*flags, "--name", "whole")
    with pytest.raises(RuntimeError, match="power failure"):
        fit(*flags, *("--trainer.callbacks+=test_fit.Stop", "--trainer.callbacks.step", 7), "--name", "part")
    part = fit(*flags, "--name", "part", "--ckpt_path", "last")
    first, second = (load_file(run / "model" / "model.safetensors") for run in (whole, part))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_two_processes_prune_as_one(fit, recipe: Path, tmp_path: Path):
    flags = options("llama", kind="heads", frequency=2)
    one = fit(*flags)
    runs = Runs(tmp_path / "processes")
    runs.folder.mkdir()
    two = ("--trainer.devices", 2, "--data.batch_size", 2, "--trainer.strategy", "ddp")
    runs({"ddp": ("fit", "--config", recipe, *flags, *two)})
    assert not runs.error("ddp")
    first, second = (load_file(run / "model" / "model.safetensors") for run in (one, runs.folder / "ddp"))
    assert all(torch.allclose(first[name], second[name], atol=1e-4) for name in first)


@pytest.mark.slow
def test_pruned_pretrained_model_is_measured_beside_what_it_was(fit):
    dense = fit("--model.network", json.dumps(NETWORKS["gpt2"]))
    flags = options("gpt2", table="true", end=4)[:-2]
    run = fit(*flags, "--model.network", "null", "--model.pretrained", dense, "--data.tokenizer.path", dense / "model")
    with open(run / "compressed" / "compression.csv", newline="") as file:
        before, after = csv.DictReader(file)
    assert int(after["parameters"]) < int(before["parameters"])
    assert 0 < float(before["loss"]) != float(after["loss"]) > 0
    code = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    assert subprocess.run([python("transformers"), "-c", code, run / "model"]).returncode == 0


@pytest.mark.parametrize(
    ("network", "values", "message"),
    [
        ("gpt2", {"kind": "heads"}, "transformers cannot load a GPT2LMHeadModel with fewer heads"),
        (
            "bert",
            {"kind": "layers"},
            "the blocks of BertForMaskedLM cannot be removed in training, since their sums",
        ),
        ("gpt2", {"keep": 1.0}, "keep of the structured pruning is 1.0"),
        ("gpt2", {"keep": 0.99}, "width=0.99 keeps all 128"),
        ("gpt2", {"end": 50}, "the pruning ends at step 50, but the run at step 10"),
    ],
)
def test_impossible_prunings_are_refused(fit, masked: tuple, network: str, values: dict, message: str):
    with pytest.raises(UserError, match=message):
        fit(*(masked if network == "bert" else ()), *options(network, **values))
