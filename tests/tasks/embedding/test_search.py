"""`search`: the index has the rows in their order, and a query finds the nearest ones."""

import csv
import json
import os
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


@pytest.mark.slow
def test_a_query_finds_the_nearest_texts(fit, cli, recipe: Path, tmp_path: Path):
    """By a checkpoint, whose weights the index keeps, or by a model's folder; moved, and by any of two names."""
    run = fit()
    cli("predict", "--config", recipe, "--ckpt_path", run / "checkpoints" / "last.ckpt")
    predicted = [json.loads(line) for line in (evaluation(run) / "predictions.jsonl").read_text().splitlines()]
    assert predicted == [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
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


@pytest.mark.slow
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
    with pytest.raises(UserError, match=f"names the model {run / 'model'}.* --model"):
        cli("search", two, "cups")
    assert answers(cli("search", two, "cups", "--top", 1, "--model", run)) == [["1.000", "t6", "cups"]]


def test_the_model_of_a_run_is_found_also_if_the_run_was_moved(fit, cli, recipe: Path, tmp_path: Path):
    run = fit()
    cli("predict", run, "--data.tables.predict", tmp_path / "train.csv")
    found = cli("search", run, TEXTS[1])
    shutil.move(run, tmp_path / "moved")
    assert cli("search", tmp_path / "moved", TEXTS[1]) == found
    shutil.move(evaluation(tmp_path / "moved") / "index", tmp_path / "alone")
    with pytest.raises(UserError, match="--model"):
        cli("search", tmp_path / "alone", TEXTS[1])
    assert cli("search", tmp_path / "alone", TEXTS[1], "--model", tmp_path / "moved") == found


def test_an_approximate_search(fit, cli, recipe: Path, tmp_path: Path):
    """Its graph is kept in the cache, made again with other embeddings, and never read from the index."""
    run, cache = fit(), tmp_path / "cache"
    cli("predict", "--config", recipe, "--ckpt_path", run / "checkpoints" / "last.ckpt")
    index, exact = evaluation(run) / "index", cli("search", run, TEXTS[2])
    before = sorted(index.rglob("*"))
    (index / "graph.usearch").write_bytes(b"not a graph")

    def approximate() -> str:
        return cli("search", run, TEXTS[2], "--approximate", "true", "--cache_dir", cache)

    for _ in ("made", "kept"):
        assert approximate() == exact
    (kept,) = cache.rglob("*.usearch")
    kept.write_bytes(b"damaged")
    assert approximate() == exact
    np.save(index / "embeddings.npy", np.load(index / "embeddings.npy")[:, ::-1].copy())
    approximate()
    (other,) = cache.rglob("*.usearch")
    assert other != kept and sorted(index.rglob("*")) == sorted([*before, index / "graph.usearch"])


def test_damaged_indexes_are_refused(fit, cli, recipe: Path, tmp_path: Path):
    run = fit()
    cli("predict", "--config", recipe, "--ckpt_path", run / "checkpoints" / "last.ckpt")
    index = evaluation(run) / "index"
    about, vectors = json.loads((index / "index.json").read_text()), np.load(index / "embeddings.npy")

    def refused(pattern: str) -> None:
        with pytest.raises(UserError, match=pattern):
            cli("search", index, "cups")

    for change, pattern in (
        ({"model": "../../../../elsewhere"}, "--model"),
        ({"model": str(tmp_path)}, "--model"),
        ({"model": "owner/name"}, "names the model owner/name.* --model"),
        ({"model": "\x1b[2J"}, "must be a name"),
        ({"pooling": "max"}, "must be mean or cls"),
        ({"max_length": 65}, "allows 3 to 64"),
        ({"max_length": True}, "must be a number of tokens"),
    ):
        (index / "index.json").write_text(json.dumps(about | change))
        refused(pattern)
    (index / "index.json").write_text(json.dumps(about))
    np.save(index / "embeddings.npy", np.array([Harm(tmp_path)], object), allow_pickle=True)
    refused("embeddings.npy is damaged")
    assert not (tmp_path / "harmed").exists()
    for other in (vectors.astype("float64"), vectors[0], vectors[:0]):
        np.save(index / "embeddings.npy", other)
        refused("must have dtype float32")
    np.save(index / "embeddings.npy", vectors / np.float32(0))
    refused("not finite")
    np.save(index / "embeddings.npy", vectors[:5])
    refused("5 embeddings but 6 texts")
    np.save(index / "embeddings.npy", vectors)
    lines = (index / "rows.jsonl").read_text().splitlines()
    (index / "rows.jsonl").write_text("\n".join([*lines[:3], '{"id": 3}', *lines[4:]]))
    refused("rows.jsonl:4: this row has no id and text")
    (index / "rows.jsonl").write_text("\n".join([*lines[:3], '{"id": "a\\nb", "text": "\\u001b[2J"}', *lines[4:]]))
    assert "\ta b\t\\u001b[2J\n" in cli("search", index, "cups")


class Harm:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder / "harmed"),)


def test_refusals(fit, cli, recipe: Path, tmp_path: Path):
    assert "has no index" in refusal(command("search", tmp_path, "cups"))
    run = fit()
    cli("predict", "--config", recipe, "--model.network", "null", "--model.pretrained", run)
    (index,) = run.glob("evaluations/*/index")
    with pytest.raises(UserError, match="the query is empty"):
        cli("search", index, " ")
    with pytest.raises(UserError, match="top is 0"):
        cli("search", index, "cups", "--top", 0)
    with pytest.raises(UserError, match="does not exist"):
        cli("search", index, "cups", "--model", run / "none")
