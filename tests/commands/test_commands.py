"""prepare, generate and export, and that they start fast."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import command, evaluation

from lm_lightning.__main__ import CORE, commands
from lm_lightning.errors import UserError


@pytest.fixture
def run(finished: Path) -> Path:
    return finished


@pytest.mark.parametrize(
    "name", ["--help", *(f"{n} --help" for n, (module, _) in sorted(commands().items()) if module != CORE["fit"][0])]
)
def test_help_of_commands_that_do_not_train_imports_no_heavy_library(name: str):
    script = (
        "import sys, runpy\n"
        "try: runpy.run_module('lm_lightning', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'lightning', 'transformers', 'numpy', 'datasets'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", script, *name.split()], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr
    assert "usage: " in result.stdout


def test_help_explains_the_options(cli):
    text = command("export", "--help").stdout
    assert "max_shard_size" in text
    text = " ".join(command("fit", "--model.help", "CausalLM").stdout.split())
    assert "Settings of a new `transformers` network" in text and "In which the rate rises".lower() in text.lower()


def test_prepare_counts_and_shows_samples(cli, recipe: Path):
    out = cli("prepare", "--config", recipe)
    train = next(line for line in out.splitlines() if line.startswith("train")).split()
    assert int(train[1]) > 400 and "unigram perplexity" in out
    shown = cli("prepare", "--config", recipe, "--show", 0, 1)
    assert "--- sample 0\n0 " in shown and "--- sample 1\n" in shown
    with pytest.raises(UserError, match="no sample 1000000"):
        cli("prepare", "--config", recipe, "--show", 1000000)
    text, own = recipe.read_text(), yaml.safe_load(recipe.read_text())["data"]["class_path"]
    recipe.write_text(text.replace(own, "lightning.pytorch.demos.boring_classes.BoringDataModule"))
    with pytest.raises(UserError, match="uses .*BoringDataModule, whose data `prepare` does not tokenize"):
        cli("prepare", "--config", recipe)
    for name in ("OtherData", "no.Such", "torch.nn.Linear", "os.getcwd"):
        recipe.write_text(text.replace(own, name))
        with pytest.raises(UserError, match=f"is '{name}', which is not a subclass .*: use one of .*PretrainingData"):
            cli("prepare", "--config", recipe)


def test_export_gives_the_folder_that_fit_gave(cli, run: Path, tmp_path: Path):
    from safetensors.torch import load_file

    cli("export", run, "--output", tmp_path / "out")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (run / "model", tmp_path / "out"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert {p.name for p in (run / "model").iterdir()} == {p.name for p in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match="exists already"):
        cli("export", run, "--output", tmp_path / "out")


def test_export_that_does_not_reload_to_the_same_logits_is_refused(cli, run: Path, tmp_path: Path, monkeypatch):
    from lm_lightning.models import export

    def damaged(description, weights, *rest):
        save(description, {name: weight * 1.01 for name, weight in weights.items()}, *rest)

    save = export.save_network
    monkeypatch.setattr(export, "save_network", damaged)
    with pytest.raises(UserError, match="outputs differ"):
        cli("export", run, "--output", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_predict_writes_a_line_a_sample(cli, run: Path, recipe: Path):
    cli("predict", "--config", recipe, "--ckpt_path", run / "checkpoints" / "last.ckpt")
    rows = [json.loads(line) for line in (evaluation(run) / "predictions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == list(range(len(rows))) and len(rows) > 10
    out = cli("test", "--config", recipe, "--ckpt_path", run / "checkpoints" / "last.ckpt")
    mean = sum(row["loss"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows)
    shown = float(next(line for line in out.splitlines() if "test/loss" in line).split("│")[2])
    assert shown == pytest.approx(mean, abs=1e-5)
