"""One flag changes the strategy, and nothing else changes."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from processes import Runs

FLAGS = {
    "one": (),
    "ddp": ("--trainer.strategy", "ddp", "--data.batch_size", 2),
    "accumulated": ("--trainer.strategy", "ddp", "--data.batch_size", 1, "--trainer.accumulate_grad_batches", 2),
    "fsdp2": ("--trainer.strategy", "fsdp2", "--data.batch_size", 2),
    "folder": (
        *("--trainer.strategy", "lm_lightning.strategies.FSDP2", "--trainer.strategy.sharded_checkpoints", "true"),
        *("--data.batch_size", 2),
    ),
    "tp": ("--trainer.strategy", "tp"),
    "split": (
        *("--trainer.strategy", "lm_lightning.strategies.TensorParallel"),
        *("--trainer.strategy.sharded_checkpoints", "true"),
    ),
}
NETWORKS = {
    "gpt2": {
        "model_type": "gpt2",
        **{"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64},
        **{"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
    },
    "qwen3": {
        "model_type": "qwen3",
        **{"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"head_dim": 8, "intermediate_size": 64, "max_position_embeddings": 64},
    },
    "bert": {
        "model_type": "bert",
        **{"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64},
        **{"max_position_embeddings": 64, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0},
    },
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, cache_dir: Path):
    """Writes a recipe of a tiny network of a type and returns the arguments that train it for ten steps."""
    folder = tmp_path_factory.mktemp("recipes")

    def write(network: str, *flags: object) -> tuple:
        masked = network == "bert"
        content = {
            "model": {
                "class_path": "MaskedLM" if masked else "CausalLM",
                "init_args": {"network": NETWORKS[network], "schedule": {"warmup_steps": 2}},
            },
            "data": {
                "class_path": "MaskedData" if masked else "PretrainingData",
                "init_args": {
                    **{"corpus": {"paths": [str(corpus_file)]}, "tokenizer": {"vocab_size": 300}},
                    **{"block_size": 32, "batch_size": 4, "cache_dir": str(cache_dir)},
                },
            },
            "trainer": {
                **{"max_steps": 10, "check_val_every_n_epoch": None, "log_every_n_steps": 1},
                **{"accelerator": "cpu", "precision": "32-true", "devices": "auto"},
            },
        }
        file = folder / f"{network}.yaml"
        file.write_text(yaml.safe_dump(content))
        return ("fit", "--config", file, *flags)

    return write


def commands(recipe, network: str, names: list[str], *flags: object) -> dict[str, tuple]:
    """Runs of a network, one a strategy, each named `<strategy>_<network>`."""
    result = {}
    for name in names:
        micro_batches = 5 * (2 if name == "accumulated" else 1)  # a validation each five steps
        devices = 1 if name == "one" else 2
        own = (*FLAGS[name], "--trainer.val_check_interval", micro_batches, "--trainer.devices", devices)
        result[f"{name}_{network}"] = recipe(network, *own, *flags)
    return result


@pytest.mark.parametrize("network", ["gpt2", "bert", "qwen3"])
def test_every_strategy_has_the_losses_of_one_process(runs, recipe, network: str):
    strategies = ["ddp", "accumulated", "fsdp2", "tp"]
    runs(commands(recipe, network, ["one", *strategies]))
    one = f"one_{network}"
    assert len(runs.log(one, "step", "train/loss")) == 10
    for name in strategies:
        other = f"{name}_{network}"
        assert runs.differ(one, other, "step", "train/loss") < 1e-5
        assert runs.differ(one, other, "step", "train/gradient_norm") < 2e-3
        assert runs.differ(one, other, "step", "val/loss") < 1e-5


@pytest.mark.parametrize(
    ("network", "states", "others"),
    [
        ("gpt2", ["one", "ddp", "fsdp2", "folder", "tp", "split"], ["one", "ddp", "fsdp2", "tp"]),
        ("bert", ["one", "folder", "tp"], ["one", "fsdp2", "split"]),
    ],
    ids=["gpt2", "bert"],
)
def test_checkpoint_of_any_strategy_goes_on_under_any_other(
    runs, recipe, network: str, states: list[str], others: list[str]
):
    """Saved at step 5 of 10 under each, resumed under each: losses and export are those of a run never stopped."""
    flags = ("--model.schedule.shape", "constant", "--data.batch_size", 4)
    whole = f"one_{network}_whole"
    runs({whole: commands(recipe, network, ["one"], *flags)[f"one_{network}"]})
    halves = commands(recipe, network, states, "--model.schedule.shape", "constant", "--trainer.max_steps", 5)
    runs({f"{name}_half": command for name, command in halves.items()})
    resumed = {}
    for state in states:
        checkpoint = runs.folder / f"{state}_{network}_half" / "checkpoints" / "last.ckpt"
        assert checkpoint.is_dir() == (state in ("folder", "split"))
        checkpoint = checkpoint.rename(runs.folder / f"{state}_{network}.ckpt")  # else it goes on in its own folder
        goes_on = commands(recipe, network, others, "--model.schedule.shape", "constant", "--ckpt_path", checkpoint)
        resumed |= {f"{name}_from_{state}": command for name, command in goes_on.items()}
    runs(resumed)
    expected = runs.log(whole, "step", "train/loss")[5:]
    weights = safetensors.torch.load_file(runs.folder / whole / "model" / "model.safetensors")
    for name in resumed:
        logged = runs.log(name, "step", "train/loss")
        assert [step for step, _ in logged] == [step for step, _ in expected], name
        assert max(abs(a[1] - b[1]) for a, b in zip(logged, expected)) < 1e-5, name
        own = safetensors.torch.load_file(runs.folder / name / "model" / "model.safetensors")
        assert own.keys() == weights.keys()
        assert all(torch.allclose(own[key], weights[key], atol=1e-4) for key in weights), name
