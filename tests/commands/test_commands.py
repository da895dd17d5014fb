"""prepare, generate and export, and that they start fast."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import command, evaluation, refusal

from lm_lightning.errors import UserError


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, cache_dir: Path) -> Path:
    """A finished run of the tiny recipe."""
    from conftest import recipe

    folder = tmp_path_factory.mktemp("run")
    file = recipe.__wrapped__(folder, corpus_file, cache_dir)
    result = command("fit", "--config", file, "--trainer.max_steps", 60, "--trainer.limit_val_batches", 0)
    assert result.returncode == 0, result.stderr
    (run,) = (folder / "runs" / "tiny").iterdir()
    return run


@pytest.mark.parametrize(
    "name", ["--help", "prepare --help", "generate --help", "export --help", "verify --help", "report --help"]
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
    text = command("generate", "--help").stdout
    assert "Under 1 sharpens, over 1 flattens the distribution." in " ".join(text.split())
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
    recipe.write_text(recipe.read_text().replace("PretrainingData", "OtherData"))
    with pytest.raises(UserError, match="data from .*OtherData, which prepare cannot tokenize"):
        cli("prepare", "--config", recipe)


def test_prepare_shows_the_samples_of_a_bert_as_they_are_before_masking(cli, recipe: Path):
    content = yaml.safe_load(recipe.read_text())
    content["data"]["class_path"] = "MaskedData"
    content["data"]["init_args"]["tokenizer"] = {"vocab_size": 300, "algorithm": "wordpiece", "lowercase": True}
    content["data"]["init_args"]["masking"] = {"rate": 0.2}
    recipe.write_text(yaml.safe_dump(content))
    out = cli("prepare", "--config", recipe)
    train = next(line for line in out.splitlines() if line.startswith("train")).split()
    blocks = int(train[5].replace(",", ""))
    shown = cli("prepare", "--config", recipe, "--show", 0, blocks - 1)
    assert "--- sample 0\n[CLS] 0 " in shown and f"--- sample {blocks - 1}\n" in shown and "[MASK]" not in shown
    pairs = cli("prepare", "--config", recipe, "--data.next_sentence", "true", "--show", 0)
    assert "--- sample 0\n" in pairs and "second one may be of any document" in pairs


def test_generated_text_of_a_prompt_is_the_same_alone_and_beside_others(cli, run: Path, tmp_path: Path):
    prompts = ["The", "7 The old captain watched the lantern before the", "My neighbour forgot"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    for flags in (("--greedy", "true"), ("--temperature", 1.2, "--top_p", 0.95, "--seed", 3)):
        out = cli("generate", run, "--prompts_file", tmp_path / "prompts.txt", "--max_new_tokens", 12, *flags)
        together = [json.loads(line) for line in out.splitlines()]
        assert [answer["prompt"] for answer in together] == prompts
        for answer in together:
            alone = cli("generate", run, "--prompt", answer["prompt"], "--max_new_tokens", 12, *flags)
            assert alone.rstrip("\n") == (answer["prompt"] + answer["text"]).rstrip("\n")


def test_seed_decides_the_text(cli, run: Path):
    def text(seed: int) -> str:
        return cli("generate", run, "--prompt", "The", "--max_new_tokens", 20, "--temperature", 1.5, "--seed", seed)

    assert text(1) == text(1) != text(2)


def test_greedy_text_is_that_of_transformers(cli, run: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = tokenizer("The old", return_tensors="pt")
    expected = tokenizer.decode(model.generate(**ids, max_new_tokens=20, do_sample=False)[0], skip_special_tokens=True)
    out = cli("generate", run, "--prompt", "The old", "--max_new_tokens", 20, "--greedy", "true")
    assert out.rstrip("\n") == expected.rstrip("\n")


def test_overlong_prompt_names_the_limit_and_a_short_rest_is_told(cli, run: Path, capsys):
    with pytest.raises(UserError, match="context holds 64"):
        cli("generate", run, "--prompt", "The old captain watched the lantern. " * 20)
    result = command("generate", run, "--prompt", "The old captain", "--max_new_tokens", 100)
    assert result.returncode == 0 and "leaves room for" in result.stderr


def test_chat_remembers_and_ends(run: Path):
    result = subprocess.run(
        [sys.executable, "-m", "lm_lightning", "generate", run, "--chat", "true", "--max_new_tokens", "5"],
        input="The girl\nThe cat\n\n",
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("> ") == 3 and "no chat template" in result.stderr


def test_generate_refuses_what_is_no_model(cli, tmp_path: Path):
    with pytest.raises(UserError, match="neither a run folder nor a from_pretrained folder"):
        cli("generate", tmp_path, "--prompt", "a")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="lm_lightning export"):
        cli("generate", tmp_path, "--prompt", "a")
    assert "only one of" in refusal(command("generate", tmp_path, "--prompt", "a", "--chat", "true"))


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
