"""LoRA: the base stays as it is, checkpoints are small, and what is exported is what was trained."""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from clauses import recipe as recipe_of
from conftest import needs, paragraphs
from forks import python
from lightning.pytorch import Callback, LightningModule, Trainer
from processes import Runs
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from lm_lightning.checkpoints.loading import load_checkpoint
from lm_lightning.data.tokenizer import Tokenizer, train
from lm_lightning.errors import UserError
from lm_lightning.lora.lora import LoRA
from lm_lightning.security.trust import PACKAGES
from lm_lightning.sharding.strategy import FSDP2, TensorParallel  # fork: sharding

SIZES = {
    "gpt2": {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 64},
    "llama": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    "bert": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
}
ADAPTED = {  # inputs and outputs of the linear layers of a block
    "gpt2": [(64, 192), (64, 64), (64, 256), (256, 64)],
    "llama": [(64, 64)] * 4 + [(64, 128)] * 2 + [(128, 64)],
    "bert": [(64, 64)] * 4 + [(64, 128), (128, 64)],
}
TOKENS = torch.arange(5, 29).view(2, 12)
LOGITS = "--trainer.callbacks+=test_lora.Logits"


class Logits(Callback):
    """Writes what the trained network gives for `TOKENS` to `logits.pt` in the run folder, and looks at its base."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.base = {n: p.detach().clone() for n, p in pl_module.network.named_parameters() if not p.requires_grad}

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logits = pl_module.network.eval()(TOKENS)[0]
        parameters = dict(pl_module.network.named_parameters())
        same = all(torch.equal(tensor, parameters[name]) for name, tensor in self.base.items())
        torch.save({"logits": logits, "same": same, "frozen": len(self.base)}, f"{trainer.default_root_dir}/logits.pt")


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
    return [
        *weights,
        "--model.adapter",
        "LoRA",
        *(f"--model.adapter.{name}={value}" for name, value in settings.items()),
    ]


def state(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.slow
def test_export_and_adapter_give_what_was_trained(fit, cli, masked: tuple, bases, tmp_path: Path):
    """In a process that has not this project; and the command makes the same of the checkpoint."""
    runs = {}
    for kind, base in [("gpt2", "full"), ("gpt2", "nf4"), ("llama", "nf4"), ("llama", "int8"), ("bert", "full")]:
        name = f"{kind}-{base}"
        runs[name] = fit("--name", name, *(masked if kind == "bert" else ()), *flags(bases[kind], base=base), LOGITS)
        files = [runs[name] / file for file in ("model/model.safetensors", "adapter/adapter_model.safetensors")]
        before, adapter = map(load_file, files)
        files[1].unlink()
        cli("export", runs[name])
        after, again = map(load_file, files)
        assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before | after)
        assert all(torch.equal(adapter[key], again[key]) for key in adapter | again)
        frozen = load_file(bases[kind] / "model.safetensors")
        assert before.keys() == frozen.keys()
        changed = {key for key in frozen if not torch.equal(frozen[key], before[key])}
        assert len(changed) == 2 * len(ADAPTED[kind]) and all(".h." in key or ".layer" in key for key in changed)
    script = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
found, tokens = {}, torch.arange(5, 29).view(2, 12)
for name, run in json.loads(sys.argv[1]).items():
    auto = AutoModelForMaskedLM if name.startswith("bert") else AutoModelForCausalLM
    with torch.no_grad():
        plain = auto.from_pretrained(f"{run}/model").eval()
        assert plain.dtype == torch.float32 and not hasattr(plain.config, "quantization_config")
        found[name] = [plain(tokens)[0]]
        code = open(f"{run}/adapter/README.md").read().split("```python")[1].split("```")[0]
        exec(code.replace("THIS_FOLDER", f"{run}/adapter"))
        for module in base.modules():  # else it computes in bf16 on such CPUs
            module.support_avx512bf16_for_cpu = False
        found[name].append(model.eval()(tokens)[0])
torch.save(found, sys.argv[2])
assert "lm_lightning" not in sys.modules
"""
    arguments = json.dumps({name: str(run) for name, run in runs.items()})
    done = subprocess.run(
        [python("transformers"), "-c", script, arguments, tmp_path / "found.pt"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt")
    for name, run in runs.items():
        trained = torch.load(run / "logits.pt")["logits"]
        merged, adapted = ((other - trained).abs().max() for other in found[name])
        assert adapted < 1e-5, (name, adapted)
        assert merged < (1e-5 if "int8" not in name else 0.1), (name, merged)  # which quantizes what comes in, too
        kind, base = name.split("-")
        auto = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
        with torch.no_grad():
            assert (auto.from_pretrained(bases[kind])(TOKENS)[0] - trained).abs().max() > 0.1  # it has learned


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "base"),
    [("gpt2", "full"), ("gpt2", "int8"), ("gpt2", "fp4"), ("llama", "nf4"), ("bert", "int8"), ("bert", "nf4")],
)
def test_adapters_alone_are_trained_and_saved(cli, recipe: Path, masked: tuple, bases, kind: str, base: str):
    bert = masked if kind == "bert" else ()
    out = cli("fit", "--config", recipe, *bert, *flags(bases[kind], base=base), LOGITS, "--trainer.max_steps", 3)
    run = Path(out.split("run folder: ")[1].splitlines()[0])
    told = torch.load(run / "logits.pt")
    assert told["same"] and told["frozen"] > 15
    trained = sum(2 * 4 * sum(sizes) for sizes in ADAPTED[kind])
    layers = 2 * len(ADAPTED[kind])
    assert f"lora: rank 4 in {layers} layers (base: {base}), {trained:,} parameters are trained" in out
    saved = state(run)
    assert all(".lora_A." in name or ".lora_B." in name for name in saved["state_dict"])
    assert sum(tensor.numel() for tensor in saved["state_dict"].values()) == trained
    assert all(tensor.any() for tensor in saved["state_dict"].values())  # B began at zero
    of_optimizer = sum(len(group["params"]) for group in saved["optimizer_states"][0]["param_groups"])
    assert of_optimizer == len(saved["state_dict"]) == 2 * layers


def test_only_the_named_layers_are_adapted(fit, bases):
    names = state(fit(*flags(bases["llama"], modules='["*mlp*"]'), "--trainer.max_steps", 3))["state_dict"]
    assert len(names) == 2 * 2 * 3 and all(".mlp." in name for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["full", "nf4"])
def test_resumed_run_ends_in_the_same_bits(fit, cli, recipe: Path, bases, base: str):
    """Dropout of the adapters included; and the checkpoint is measured as the run had measured it."""
    settings = flags(bases["gpt2"], base=base, dropout=0.3)
    whole = fit("--name", "whole", *settings)
    with pytest.raises(RuntimeError, match="power failure"):
        fit("--name", "part", *settings, "--trainer.callbacks+=test_fit.Stop", "--trainer.callbacks.step", 7)
    part = fit("--name", "part", *settings, "--ckpt_path", "last")
    first, second = state(whole), state(part)
    assert all(torch.equal(first["state_dict"][name], second["state_dict"][name]) for name in first["state_dict"])
    models = [load_file(run / "model" / "model.safetensors") for run in (whole, part)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    out = cli("validate", "--config", recipe, *settings, "--ckpt_path", part / "checkpoints" / "best.ckpt")
    (line,) = [line for line in out.splitlines() if "val/loss" in line]
    best = torch.load(part / "checkpoints" / "best.ckpt", weights_only=True)
    (score,) = {
        float(value["best_model_score"])
        for value in best["callbacks"].values()
        if isinstance(value, dict) and value.get("monitor") == "val/loss"
    }
    assert float(line.split("│")[2]) == pytest.approx(score, abs=1e-5)
    other = state(fit("--name", "other", *flags(bases["gpt2"], base=base, dropout=0)))  # it is not without dropout
    assert not any(torch.equal(tensor, other["state_dict"][name]) for name, tensor in first["state_dict"].items())


@pytest.mark.slow
def test_a_checkpoint_is_refused_where_it_does_not_belong(fit, cli, recipe: Path, bases, tmp_path: Path):
    folder = shutil.copytree(bases["gpt2"], tmp_path / "base")
    run = fit(*flags(folder), "--trainer.max_steps", 5)
    resume = ("--ckpt_path", "last", "--trainer.max_steps", 8)
    for settings, message in (
        (flags(folder, rank=8), r"model.adapter has rank 4 \(here 8\)"),
        (flags(folder, alpha=1), r"model.adapter has alpha 16.0 \(here 1.0\)"),
        (flags(folder, base="nf4"), r"base full \(here nf4\)"),
        (
            flags(folder)[:6],
            "the checkpoint has an adapter: give --model.pretrained .* --model.adapter LoRA --model.adapter.rank 4",
        ),
    ):
        with pytest.raises(UserError, match=message):
            fit(*settings, *resume)
    moved = folder.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="adapter needs its base.* does not exist"):
        cli("export", run)
    fit(*flags(moved), *resume)  # the same weights
    weights = load_file(moved / "model.safetensors")
    weights["transformer.h.1.mlp.c_fc.weight"][3, 3] += 1e-3
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    for command in (("fit", *resume), ("validate", "--ckpt_path", run / "checkpoints" / "last.ckpt")):
        with pytest.raises(UserError, match="are not those that the checkpoint's adapter was trained on"):
            cli(command[0], "--config", recipe, *flags(moved), *command[1:])
    with pytest.raises(UserError, match="are not those that the checkpoint's adapter was trained on"):
        cli("export", run)
    plain = fit(*flags(folder := bases["gpt2"])[:6], "--trainer.max_steps", 5)
    with pytest.raises(UserError, match="the checkpoint has no adapter"):
        fit(*flags(folder), "--ckpt_path", plain / "checkpoints" / "last.ckpt", "--trainer.max_steps", 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "model", "monitor", "base"),
    [
        pytest.param("TaggingData", "Tagging", "val/f1", "full", marks=needs("tasks.tagging")),
        pytest.param("ParsingData", "Parser", "val/las", "nf4", marks=needs("tasks.parsing")),
    ],
)
def test_new_heads_are_trained_saved_and_exported(
    cli, tmp_path: Path, monkeypatch, data: str, model: str, monitor: str, base: str
):
    monkeypatch.setenv(PACKAGES, "test_lora")  # so that the run's own config may import Logits
    file, folder = recipe_of(tmp_path, model, data, monitor), tmp_path / "base"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tok")
    torch.manual_seed(0)
    config = AutoConfig.for_model("bert", vocab_size=len(tokenizer), max_position_embeddings=64, **SIZES["bert"])
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    steps = ("--trainer.max_steps", 80, "--trainer.val_check_interval", 80)
    out = cli("fit", "--config", file, *flags(folder, base=base), LOGITS, *steps)
    run = Path(out.split("run folder: ")[1].splitlines()[0])
    trained = torch.load(run / "logits.pt")
    assert trained["same"]
    names = [name for name in state(run)["state_dict"] if name.startswith("network.") and ".lora_" not in name]
    assert names and all(".pooler." in name or ".classifier." in name or ".parser." in name for name in names)

    def score(out: str) -> float:
        return float(next(line for line in out.splitlines() if monitor in line).split("│")[2])

    measure = ("validate", "--config", file, "--model.network", "null", "--model.pretrained")
    by_checkpoint = score(
        cli(*measure[:3], *flags(folder, base=base), "--ckpt_path", run / "checkpoints" / "last.ckpt")
    )
    assert by_checkpoint == pytest.approx(score(cli(*measure, run)), abs=1e-4) and by_checkpoint > 0.5
    merged = load_file(run / "model" / "model.safetensors")
    cli("export", run)
    assert all(
        torch.equal(tensor, merged[name]) for name, tensor in load_file(run / "model" / "model.safetensors").items()
    )
    if model == "Tagging":
        from peft import PeftModel

        labels = len(json.loads((run / "model" / "config.json").read_text())["id2label"])
        plain = AutoModelForTokenClassification.from_pretrained(folder, num_labels=labels)
        with torch.no_grad():
            told = PeftModel.from_pretrained(plain, run / "adapter").eval()(TOKENS)[0]
        assert torch.allclose(told, trained["logits"], atol=1e-5)


@needs("tasks.classification")
@pytest.mark.slow
def test_a_new_head_over_texts_goes_into_both_exports(cli, bases, tmp_path: Path):
    """With a pooler, which a masked language model has not."""
    from peft import PeftModel

    texts = [" ".join(text.split()[1:8]) for text in paragraphs(200)]
    rows = [{"text": text, "label": "captain" if "captain" in text else "other"} for text in texts]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"tables": {"train": str(tmp_path / "rows.jsonl"), "validation_fraction": 0.2}, "max_length": 32}
    config = {
        "model": {"class_path": "Classification", "init_args": {"schedule": {"warmup_steps": 1}}},
        "data": {"class_path": "ClassificationData", "init_args": options},
        "trainer": {"max_steps": 30, "accelerator": "cpu", "precision": "32-true"},
        "runs_dir": str(tmp_path / "runs"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    settings = flags(bases["bert"])[2:4] + flags(bases["bert"])[6:]
    out = cli("fit", "--config", tmp_path / "recipe.yaml", *settings, LOGITS, "--export", "last")
    run = Path(out.split("run folder: ")[1].splitlines()[0])
    plain, merged = (
        AutoModelForSequenceClassification.from_pretrained(folder) for folder in (bases["bert"], run / "model")
    )
    assert merged.config.id2label == {0: "captain", 1: "other"}
    trained = torch.load(run / "logits.pt")["logits"]
    for network in (merged, PeftModel.from_pretrained(plain, run / "adapter")):
        with torch.no_grad():
            assert torch.allclose(network.eval()(TOKENS)[0], trained, atol=1e-5)


@needs("sharding")
@pytest.mark.slow
def test_two_processes_do_what_one_does(fit, recipe: Path, bases, tmp_path: Path):
    """And a sharded checkpoint, which has not the base either, is gone on from."""
    runs, alone, commands = Runs(tmp_path / "two"), {}, {}
    runs.folder.mkdir()
    ddp = ("--trainer.strategy", "ddp")
    folders = ("--trainer.strategy", "FSDP2", "--trainer.strategy.sharded_checkpoints", "true")
    for base in ("full", "nf4"):
        settings = (*flags(bases["llama"], base=base, dropout=0), "--model.schedule.shape", "constant")
        alone[base] = fit(*settings)
        two = ("fit", "--config", recipe, *settings, "--trainer.devices", 2, "--data.batch_size", 2)
        commands[base] = (*two, *ddp)
        if base == "full":
            last = runs.folder / "fsdp2" / "checkpoints" / "last.ckpt"
            commands["fsdp2"] = (*two, *folders, "--trainer.max_steps", 6)
            commands["resumed"] = (*two, *folders, "--ckpt_path", last)
    runs(commands)
    assert not runs.error("resumed")
    for name, base in (("full", "full"), ("nf4", "nf4"), ("fsdp2", "full")):
        shutil.copytree(alone[base], runs.folder / f"one_{name}")
        assert runs.differ(name, f"one_{name}", "train/loss") < 1e-5
        first, second = (load_file(runs.folder / n / "model" / "model.safetensors") for n in (name, f"one_{name}"))
        assert all(torch.allclose(first[key], second[key], atol=1e-4) for key in second), name
        adapters = [load_file(runs.folder / n / "adapter" / "adapter_model.safetensors") for n in (name, f"one_{name}")]
        assert all(torch.allclose(adapters[0][key], adapters[1][key], atol=1e-4) for key in adapters[1]), name
    assert runs.differ("nf4", "one_nf4", "val/loss") < 1e-5
    weights = [name for name in load_checkpoint(last)["state_dict"] if name.startswith("network.")]
    assert all(".lora_" in name for name in weights) and len(weights) == 2 * 2 * 7


@needs("sharding")
def test_strategies_that_split_matrices_are_refused():
    with pytest.raises(UserError, match="tensor parallelism cannot split the matrices of LoRA"):
        LoRA().check(TensorParallel())
    with pytest.raises(UserError, match="nf4 does not work with FSDP2"):
        LoRA(base="nf4").check(FSDP2())
    LoRA().check(FSDP2())


def test_bits_are_those_of_the_paper_and_of_the_blocks_alone():
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=300, **SIZES["llama"]))
    for precision, dtype in (("32-true", torch.float32), ("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)):
        config = LoRA(base="nf4").loading_options(network, torch.device("cpu"), precision)["quantization_config"]
        assert config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
        assert config.bnb_4bit_compute_dtype == dtype and config.llm_int8_skip_modules == ["lm_head"]


def test_large_inputs_do_not_let_int8_see_the_tokens_to_come(fit, bases, tmp_path: Path):
    folder = shutil.copytree(bases["gpt2"], tmp_path / "large")
    weights = load_file(folder / "model.safetensors")
    scaled = {name: 5 * w if name.endswith(("ln_1.weight", "ln_2.weight")) else w for name, w in weights.items()}
    save_file(scaled, folder / "model.safetensors", metadata={"format": "pt"})
    fit(*flags(folder, base="int8"), "--trainer.max_steps", 3)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "base"), [("gpt2", "nf4"), ("llama", "full")])
def test_activation_checkpointing_changes_nothing(fit, bases, kind: str, base: str):
    """Gradients reach the adapters although nothing before the first of them is trained."""
    settings = (*flags(bases[kind], base=base), "--trainer.max_steps", 3)
    first, second = (state(fit(*settings, *more)) for more in ((), ("--model.activation_checkpointing", 1)))
    for name, tensor in first["state_dict"].items():
        assert torch.allclose(tensor, second["state_dict"][name], atol=1e-6), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--model.adapter.rank=0"], "must have a rank of 1 or more"),
        (["--model.adapter.dropout=1"], "a dropout from 0 to below 1"),
        (
            ['--model.adapter.modules=["*banana*"]'],
            r"\*banana\* matches no linear layer, such as transformer.h.0",
        ),
        (["--model.adapter.base=int3"], "int3"),
    ],
)
def test_impossible_settings_are_refused(fit, bases, settings: list, message: str):
    with pytest.raises((UserError, argparse.ArgumentError), match=message):
        fit(*flags(bases["gpt2"]), *settings)


def test_new_tokens_are_refused(fit, bases, tmp_path: Path):
    """Their rows of the embedding would stay as they were drawn."""
    folder = shutil.copytree(bases["gpt2"], tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer*"))
    larger = train(Tokenizer(algorithm="bpe", vocab_size=310), iter(paragraphs(50)), "gpt")
    larger.save_pretrained(tmp_path / "tok")
    with pytest.raises(UserError, match="has 300 tokens, the tokenizer 310, and model.adapter would not train"):
        fit(*flags(folder), "--data.tokenizer.path", tmp_path / "tok")


@pytest.mark.slow
def test_a_new_network_and_missing_packages_are_refused(fit, bases, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="model.adapter requires model.pretrained"):
        fit("--model.adapter", "LoRA")
    for name, base in (("peft", "full"), ("bitsandbytes", "nf4"), ("accelerate", "int8")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(
                UserError, match=rf'the adapter LoRA needs the package {name}: pip install -e "\.\[lora\]"'
            ):
                fit(*flags(bases["llama"], base=base))
