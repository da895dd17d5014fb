"""`search`: the index has the rows in their order, and a query finds the nearest ones."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import command, evaluation, refusal

from lm_lightning.data.tokenizer import Tokenizer, train
from lm_lightning.errors import UserError

TEXTS = [
    f"{a} {b} {'by the river ' * n}".strip() for n, a in enumerate(("red", "old", "two")) for b in ("hats", "cups")
]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A tiny BERT, to be trained on texts of which each is its own pair in other words."""
    tokenizer = train(Tokenizer(algorithm="wordpiece", vocab_size=100, lowercase=True), iter(TEXTS * 9), "bert")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with open(tmp_path / "train.csv", "w", newline="") as file:
        csv.writer(file).writerows([["text", "pair"], *([text, text.replace("the", "a")] for text in TEXTS)])
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    network = {"model_type": "bert", "max_position_embeddings": 64, **sizes}
    table = str(tmp_path / "train.csv")
    data = {
        "tables": {"train": table, "validation": table, "predict": table},
        "tokenizer": {"path": str(tmp_path / "tokenizer")},
        "max_length": 32,
        "batch_size": 4,
    }
    content = {
        "model": {"class_path": "SentenceEncoder", "init_args": {"network": network, "schedule": {"warmup_steps": 1}}},
        "data": {"class_path": "PairData", "init_args": data},
        "trainer": {"max_steps": 3, "val_check_interval": 2, "accelerator": "cpu", "precision": "32-true"},
        "runs_dir": str(tmp_path / "runs"),
    }
    file = tmp_path / "pairs.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def answers(out: str) -> list[list[str]]:
    return [line.split("\t") for line in out.splitlines()]


def test_a_query_finds_the_nearest_texts(fit, cli, recipe: Path, tmp_path: Path):
    """By a checkpoint, whose weights the index keeps, or by a model's folder; moved, and by any of two names."""
    run = fit()
    cli("predict", "--config", recipe, "--ckpt_path", run / "checkpoints" / "last.ckpt")
    told = [json.loads(line) for line in (evaluation(run) / "predictions.jsonl").read_text().splitlines()]
    assert told == [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    vectors = np.load(evaluation(run) / "index" / "embeddings.npy")
    assert vectors.shape == (6, 32) and vectors.dtype == np.float32
    for number, text in enumerate(TEXTS):
        found = answers(cli("search", run, text, "--top", 3))
        assert len(found) == 3 and found[0] == ["1.000", str(number), text]
        order = np.argsort(-(vectors @ vectors[number]), kind="stable")[:3]
        assert [int(id_) for _, id_, _ in found] == order.tolist()
    shutil.move(evaluation(run) / "index", tmp_path / "moved")
    shutil.rmtree(run)
    assert answers(cli("search", tmp_path / "moved", TEXTS[4]))[0] == ["1.000", "4", TEXTS[4]]


def test_two_processes_write_the_rows_in_their_order(fit, cli, recipe: Path, tmp_path: Path):
    run = fit()
    rows = [{"_id": f"t{i}", "text": text} for i, text in enumerate(TEXTS + ["cups"])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--config", recipe, "--model.network", "null", "--model.pretrained", run, "--data.batch_size", 2)
    flags = (*flags, "--data.tables.predict", tmp_path / "rows.jsonl")
    cli("predict", *flags, "--name", "one")
    result = command("predict", *flags, "--name", "two", "--trainer.devices", 2, "--trainer.strategy", "ddp")
    assert result.returncode == 0, result.stderr
    (one,), (two,) = ((tmp_path / "runs" / name).iterdir() for name in ("one", "two"))
    assert np.allclose(*(np.load(folder / "index" / "embeddings.npy") for folder in (one, two)), atol=1e-6)
    assert (two / "index" / "rows.jsonl").read_text() == (one / "index" / "rows.jsonl").read_text()
    assert (two / "predictions.jsonl").read_text() == (one / "predictions.jsonl").read_text()
    assert answers(cli("search", two, "cups", "--top", 1)) == [["1.000", "t6", "cups"]]


def test_an_approximate_search(fit, cli, recipe: Path):
    run = fit()
    cli("predict", "--config", recipe, "--ckpt_path", run / "checkpoints" / "last.ckpt")
    exact = cli("search", run, TEXTS[2])
    for _ in ("made", "kept"):
        assert cli("search", run, TEXTS[2], "--approximate", "true") == exact
    assert (evaluation(run) / "index" / "graph.usearch").is_file()


def test_refusals(fit, cli, recipe: Path, tmp_path: Path):
    assert "has no index" in refusal(command("search", tmp_path, "cups"))
    run = fit()
    cli("predict", "--config", recipe, "--model.network", "null", "--model.pretrained", run)
    (index,) = run.glob("evaluations/*/index")
    with pytest.raises(UserError, match="the query is empty"):
        cli("search", index, " ")
    with pytest.raises(UserError, match="top is 0"):
        cli("search", index, "cups", "--top", 0)
    shutil.rmtree(run / "model")
    with pytest.raises(UserError, match="does not exist"):
        cli("search", index, "cups")
