"""A run remembers itself: it is evaluated with its own settings, lies in one folder, and can be repeated."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import command, evaluation, needs, paragraphs, refusal
from lightning.pytorch import Callback

from lm_lightning.errors import UserError

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
BERT = {"model_type": "bert", "max_position_embeddings": 64, **SIZES}


def logged(run: Path, name: str) -> float:
    """The last value of a metric in a run's metrics.csv."""
    with open(run / "metrics.csv", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)][-1]


def record(run: Path, name: str) -> dict:
    return json.loads((evaluation(run, name) / "evaluation.json").read_text())


def labelled_rows(number: int, start: int = 0) -> list[dict]:
    texts = paragraphs(start + number, seed=3)[start:]
    return [{"review": text, "stars": "long" if text.count(".") > 2 else "short"} for text in texts]


def write_rows(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def trained(cli: Callable[..., str], recipe: Path, tmp_path: Path) -> Callable[..., tuple[Path, Path, tuple]]:
    """Trains a tiny model of a kind on data that its recipe does not name; returns the recipe, the run and the data."""

    def train(kind: str) -> tuple[Path, Path, tuple]:
        content = yaml.safe_load(recipe.read_text())
        content["trainer"] |= {"max_steps": 4, "val_check_interval": 4, "limit_val_batches": 1.0}
        own = tmp_path / "own.txt"
        own.write_text("\n\n".join(f"chapter {text.upper()} {text}" for text in paragraphs(300, seed=7)))
        flags: tuple = ("--data.corpus.paths", own)
        if kind == "bert":
            content["model"] = {"class_path": "MaskedLM", "init_args": {"network": BERT}}
            content["data"]["class_path"] = "MaskedData"
            content["data"]["init_args"]["tokenizer"] = {"algorithm": "wordpiece", "vocab_size": 200}
        if kind == "labels":
            from lm_lightning.data.tokenizer import Tokenizer
            from lm_lightning.data.tokenizer import train as train_tokenizer

            options = Tokenizer(algorithm="wordpiece", vocab_size=200)
            train_tokenizer(options, iter(paragraphs(100)), "bert").save_pretrained(tmp_path / "words")
            content["model"] = {"class_path": "Classification", "init_args": {"network": BERT}}
            content["data"] = {"class_path": "ClassificationData", "init_args": {"max_length": 64}}
            content["best"] = {"monitor": "val/loss"}
            flags = (
                *("--data.tables.train", write_rows(tmp_path / "train.jsonl", labelled_rows(60))),
                *("--data.tables.validation", write_rows(tmp_path / "dev.jsonl", labelled_rows(30, 60))),
                *("--data.columns.text", "review", "--data.columns.label", "stars"),
                *("--data.tokenizer.path", tmp_path / "words"),
            )
        content["model"]["init_args"].setdefault("schedule", {"warmup_steps": 1})
        recipe.write_text(yaml.safe_dump(content))
        out = cli("fit", "--config", recipe, *flags)
        return recipe, Path(out.split("run folder: ")[1].splitlines()[0]), flags

    return train


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "gpt",
        pytest.param("bert", marks=needs("tasks.masked_lm")),
        pytest.param("labels", marks=needs("tasks.classification")),
    ],
)
def test_a_run_is_evaluated_with_its_own_data_and_tokenizer(trained, cli, kind: str, tmp_path: Path):
    recipe, run, _ = trained(kind)
    at_the_end = logged(run, "val/loss")
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}

    result = command("validate", run, cwd=tmp_path)  # in a fresh process, which has nothing in memory
    assert result.returncode == 0, result.stderr
    found = record(run, "validate")
    assert found["metrics"]["val/loss"] == pytest.approx(at_the_end, abs=1e-5)
    assert (found["run"], found["weights"], found["split"]) == (str(run), str(run / "model"), "validation")
    assert f"weights: {run / 'model'}" in result.stdout

    out = cli("validate", "--config", recipe, "--ckpt_path", "last")
    assert record(run, "validate")["metrics"]["val/loss"] == pytest.approx(at_the_end, abs=1e-5)
    assert record(run, "validate")["weights"] == str(run / "checkpoints" / "last.ckpt")
    assert f"settings: from {run}/config.yaml, which differs from {recipe} in: " in out and "data." in out

    predict = {
        "gpt": ("--seed_everything", 1),
        "bert": ("--data.texts", "the old [MASK] watched"),
        "labels": ("--data.tables.predict", write_rows(tmp_path / "new.jsonl", [{"review": "a small girl"}] * 3)),
    }[kind]
    cli("predict", run, *predict)
    lines = (evaluation(run) / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == {"bert": 1, "labels": 3}.get(kind, len(lines)) > 0
    if kind == "labels":  # as the README has it
        cli("predict", "--config", recipe, "--model.pretrained", run, *predict)
        assert (evaluation(run) / "predictions.jsonl").read_text().splitlines() == lines
        (tmp_path / "train.jsonl").unlink()  # which the labels need no more
        cli("predict", run, *predict, "--ckpt_path", "best")
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    # The config of an evaluation repeats it.
    cli("validate", "--config", evaluation(run, "validate") / "config.yaml")
    assert record(run, "validate")["metrics"]["val/loss"] == pytest.approx(at_the_end, abs=1e-5)


@pytest.mark.slow
def test_flags_override_what_the_run_says(trained, cli, corpus_file: Path, tmp_path: Path):
    _, run, _ = trained("gpt")
    cli("validate", run, "--data.corpus.paths", corpus_file)
    found = record(run, "validate")
    assert found["files"]["corpus"]["paths"] == str(corpus_file)
    assert found["metrics"]["val/loss"] != pytest.approx(logged(run, "val/loss"), abs=1e-3)
    config = yaml.safe_load((evaluation(run, "validate") / "config.yaml").read_text())
    assert config["data"]["init_args"]["tokenizer"]["path"] == str(run / "tokenizer")
    # Any path in the run names it, and another folder or name is somewhere else.
    last = run / "checkpoints" / "last.ckpt"
    cli("validate", last, "--runs_dir", tmp_path / "elsewhere", "--trainer.limit_val_batches", 1)
    (folder,) = (tmp_path / "elsewhere" / "tiny").iterdir()
    assert json.loads((folder / "evaluation.json").read_text())["weights"] == str(last)
    with pytest.raises(UserError, match="is not a run folder"):
        cli("validate", tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        cli("test", tmp_path / "nowhere")
    with pytest.raises(UserError, match="best.ckpt is missing"):
        (run / "checkpoints" / "best.ckpt").unlink()
        cli("test", run, "--ckpt_path", "best")


@pytest.mark.slow
def test_another_tokenizer_is_refused_wherever_a_checkpoint_is_loaded(trained, cli, tmp_path: Path):
    from transformers import PreTrainedTokenizerFast

    _, run, _ = trained("gpt")
    vocabulary = json.loads((run / "tokenizer" / "tokenizer.json").read_text())
    # as many tokens, but two of them swapped
    tokens = vocabulary["model"]["vocab"]
    first, second = sorted(tokens, key=lambda token: tokens[token])[100:102]
    tokens[first], tokens[second] = tokens[second], tokens[first]
    other = tmp_path / "other"
    PreTrainedTokenizerFast.from_pretrained(run / "tokenizer").save_pretrained(other)
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    checkpoint = run / "checkpoints" / "last.ckpt"
    for name in ("validate", "test", "predict"):
        with pytest.raises(UserError, match="made with another tokenizer"):
            cli(name, run, "--ckpt_path", "last", "--data.tokenizer.path", other)
    with pytest.raises(UserError, match="another tokenizer"):
        cli("fit", "--config", run / "config.yaml", "--ckpt_path", checkpoint, "--data.tokenizer.path", other)
    (other / "tokenizer.json").replace(run / "tokenizer" / "tokenizer.json")
    with pytest.raises(UserError, match="was not trained with the tokenizer"):
        cli("export", run)
    assert not list(run.glob("evaluations/*"))


@needs("tasks.masked_lm", "generation")
@pytest.mark.slow
def test_weights_that_would_stay_random_are_refused(trained, cli, tmp_path: Path):
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

    recipe, run, flags = trained("bert")
    with pytest.raises(UserError, match="is a BertForMaskedLM, which cannot generate text"):
        cli("generate", run, "--prompt", "The")
    BertForSequenceClassification(BertConfig(vocab_size=30, **SIZES)).save_pretrained(tmp_path / "labels")
    with pytest.raises(UserError, match="no weights for .* tensors of BertLMHeadModel"):
        cli("generate", tmp_path / "labels", "--prompt", "The")

    body = tmp_path / "body"  # without a head
    BertModel.from_pretrained(run / "model").save_pretrained(body)
    AutoTokenizer.from_pretrained(run / "tokenizer").save_pretrained(body)
    fresh = ("--config", recipe, "--model.network", "null", "--model.pretrained", body, *flags)
    fresh = (*fresh, "--data.tokenizer.path", body, "--data.texts", "the [MASK]")
    for name in ("validate", "predict"):
        with pytest.raises(UserError, match=r"\(a BertModel\) has no weights for .*cls.predictions"):
            cli(name, *fresh)
    with pytest.raises(UserError, match="model.freeze would leave them random"):
        cli("fit", *fresh, "--model.freeze", "[cls.*]")
    assert [path for path in (recipe.parent / "runs").glob("*/*") if path != run] == []


@needs("generation")
def test_a_gpt_trained_to_classify_does_not_generate(tmp_path: Path, cli):
    """Though its head is tied to the embeddings, so that no weights are missing."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    GPT2ForSequenceClassification(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=30)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a GPT2ForSequenceClassification"):
        cli("generate", tmp_path, "--prompt", "The")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--trainer.default_root_dir", "out"), "--runs_dir"),
        (("--best.dirpath", "out"), "--runs_dir"),
        (("--last.dirpath", "out"), "--runs_dir"),
        (("--data.block_size", 128), "positions for 64"),
        (("--model.optimizer.init_args.lr", -1), "does not accept"),
        (("--data.corpus.paths", "[nowhere.txt]"), "nowhere.txt"),
    ],
)
def test_a_refused_command_leaves_no_folder(fit, recipe: Path, tmp_path: Path, monkeypatch, flags: tuple, reason: str):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=reason):
        fit(*flags)
    assert not (recipe.parent / "runs").exists() and not (tmp_path / "out").exists()


def test_a_run_that_fails_later_stays(fit, recipe: Path):
    with pytest.raises(RuntimeError, match="power failure"):
        fit("--trainer.callbacks", '[{"class_path": "test_fit.Stop", "init_args": {"step": 2}}]')
    (run,) = (recipe.parent / "runs" / "tiny").iterdir()
    assert (run / "config.yaml").is_file() and (run / "tokenizer").is_dir()


@pytest.mark.slow
def test_another_name_or_folder_starts_a_run_of_its_own(fit, recipe: Path, tmp_path: Path):
    def content(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    constant = ("--model.schedule.shape", "constant")
    first = fit(*constant, "--trainer.max_steps", 5)
    last, before = first / "checkpoints" / "last.ckpt", content(first)
    for flags in (("--name", "other"), ("--runs_dir", tmp_path / "B")):
        other = fit(*constant, "--ckpt_path", last, "--trainer.max_steps", 10, *flags)
        assert other != first and content(first) == before
        state = torch.load(other / "checkpoints" / "last.ckpt", weights_only=True)
        assert state["global_step"] == 10 and (other / "checkpoints" / "best.ckpt").exists()
    named = ("--name", "tiny", "--runs_dir", recipe.parent / "runs")  # those that it has
    assert fit(*constant, "--ckpt_path", last, "--trainer.max_steps", 7, *named) == first


def increment(number: int) -> int:
    return number + 1


class Thing:
    def __init__(self, number: int) -> None:
        self.number = number


class Options(Callback):
    """Options that YAML can and cannot hold."""

    def __init__(
        self,
        function: Callable[[int], int] = increment,
        own: Callable[[int], int] = lambda number: number + 2,
        thing: Any = Thing(3),
        pair: Any = (1, 2),
        limit: float = float("nan"),
    ) -> None:
        self.values = (function(1), own(1), thing.number, pair)

    def on_train_end(self, trainer: Any, *_: object) -> None:
        (Path(trainer.default_root_dir) / "values.json").write_text(json.dumps(self.values))


def test_the_saved_config_is_the_same_configuration(fit, cli):
    """Defaults that YAML cannot hold come back by themselves."""
    run = fit("--trainer.callbacks", '[{"class_path": "test_run.Options"}]', "--trainer.max_steps", 3)
    assert json.loads((run / "values.json").read_text()) == [2, 3, 3, [1, 2]]
    out = cli("fit", "--config", run / "config.yaml", "--name", "again")
    again = Path(out.split("run folder: ")[1].splitlines()[0])
    assert json.loads((again / "values.json").read_text()) == [2, 3, 3, [1, 2]]


def test_a_config_that_cannot_be_saved_is_refused_before_training(recipe: Path):
    from lm_lightning import run as runs
    from lm_lightning.cli.app import CLI

    options = {"function": lambda number: number + 5}
    settings = yaml.safe_load(recipe.read_text())
    settings["trainer"] |= {"callbacks": [{"class_path": "test_run.Options", "init_args": options}]}
    with (
        pytest.raises(UserError, match=r"trainer.callbacks.0.init_args.function cannot be saved"),
        runs.removed_if_refused(),
    ):
        CLI({"subcommand": "fit", "fit": settings})
    assert not (recipe.parent / "runs").exists()


def test_two_processes_of_a_refused_run_leave_no_folder(recipe: Path):
    flags = ("--trainer.strategy", "ddp", "--trainer.devices", 2, "--data.block_size", 128)
    assert "positions for 64" in refusal(command("fit", "--config", recipe, *flags))
    assert not (recipe.parent / "runs").exists()


def test_an_evaluation_reads_each_checkpoint_once_and_lightning_the_chosen_one_again(trained, cli, monkeypatch):
    _, run, _ = trained("gpt")
    loaded, load = [], torch.load

    def counting(file: Any, *args: Any, **settings: Any) -> Any:
        loaded.append(Path(getattr(file, "name", file)).name)
        return load(file, *args, **settings)

    monkeypatch.setattr(torch, "load", counting)
    cli("validate", run, "--ckpt_path", "last", "--trainer.limit_val_batches", 1)
    assert sorted(loaded) == ["best.ckpt", "last.ckpt", "last.ckpt"]
