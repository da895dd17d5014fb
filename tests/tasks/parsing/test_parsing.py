"""Dependency parsing: the best trees, attachment scores, and an export that loads again."""

import csv
import itertools
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from clauses import recipe as recipe_of
from clauses import sentences, write
from conftest import command, evaluation
from forks import python

from lm_lightning.errors import UserError
from lm_lightning.tasks.parsing.spanning_tree import spanning_tree


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return recipe_of(tmp_path, "Parser", "ParsingData", "val/las")


def is_tree(heads: tuple[int, ...]) -> bool:
    """One word hangs on the root, and all others on it in the end."""
    for word in range(1, len(heads) + 1):
        seen = set()
        while word and word not in seen:
            seen.add(word)
            word = heads[word - 1]
        if word:
            return False
    return heads.count(0) == 1


@pytest.mark.parametrize("words", [1, 2, 3, 5])
def test_spanning_tree_is_the_best_of_all(words: int):
    draw = np.random.default_rng(0)
    trees = [heads for heads in itertools.product(range(words + 1), repeat=words) if is_tree(heads)]
    for _ in range(60):
        scores = draw.normal(size=(words, words + 1)) * draw.choice([0.1, 10])
        scores[draw.random(scores.shape) < 0.2] -= 50
        scores[np.arange(words), np.arange(words) + 1] = -np.inf
        values = [sum(scores[word, head] for word, head in enumerate(heads)) for heads in trees]
        predicted = spanning_tree(scores)
        assert is_tree(tuple(predicted.tolist()))
        assert sum(scores[np.arange(words), predicted]) == pytest.approx(max(values))


def logged(run: Path, *names: str) -> list[float]:
    with open(run / "metrics.csv", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) for name in names if row[name]]


def predictions(run: Path) -> list[dict]:
    return [json.loads(line) for line in (evaluation(run) / "predictions.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_trees_are_learned_scored_and_told_again_by_the_export(fit, cli, recipe: Path, tmp_path: Path):
    run = fit("--trainer.max_steps", 100, "--trainer.val_check_interval", 50)
    out = cli("test", "--config", recipe, "--ckpt_path", run / "checkpoints" / "best.ckpt")
    cli("predict", "--config", recipe, "--ckpt_path", run / "checkpoints" / "best.ckpt")
    predicted, gold = predictions(run), sentences(45, 2)
    assert all(is_tree(tuple(row["heads"])) for row in predicted)
    assert all(
        (head == 0) == (name == "root") for row in predicted for head, name in zip(row["heads"], row["relations"])
    )
    pairs = [
        (head == right_head, name.partition(":")[0] == right_name.partition(":")[0])
        for row, right in zip(predicted, gold)
        for head, name, right_head, right_name in zip(row["heads"], row["relations"], right["head"], right["deprel"])
    ]
    assert len(pairs) == sum(len(row["words"]) for row in gold)
    uas, las = np.mean([head for head, _ in pairs]), np.mean([head and name for head, name in pairs])
    assert las > 0.8
    for name, value in {"uas": uas, "las": las}.items():
        (line,) = [line for line in out.splitlines() if f"test/{name}" in line]
        assert float(line.split("│")[2]) == pytest.approx(value, abs=1e-6)

    # The folder is one of `AutoModel`, and has the head beside it: the same trees, from it alone.
    code = """
import sys
from transformers import AutoModel
model, info = AutoModel.from_pretrained(sys.argv[1], output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
assert "lm_lightning" not in sys.modules
"""
    done = subprocess.run([python("transformers"), "-c", code, run / "model"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = ("--model.network", "null", "--model.pretrained", run / "model", "--data.tables.train", "[]")
    out = cli("predict", "--config", recipe, *content, "--runs_dir", tmp_path / "again")
    (again,) = (tmp_path / "again").glob("*/*")
    assert predictions(again) == predicted
    exported = cli("export", run, "--checkpoint", "best", "--output", tmp_path / "exported")
    assert (tmp_path / "exported" / "head.safetensors").is_file(), exported


@pytest.mark.slow
def test_two_processes_do_and_score_what_one_does(fit, recipe: Path):
    off = ("--model.network.hidden_dropout_prob", 0, "--model.network.attention_probs_dropout_prob", 0)
    flags = (*off, "--model.dropout", 0, "--trainer.max_steps", 10, "--trainer.val_check_interval", 5)
    names = ("train/loss", "val/loss", "val/uas", "val/las")
    one = logged(fit("--name", "one", *flags), *names)
    strategies = ["ddp"]
    strategies += ["fsdp2"]  # fork: sharding
    for strategy in strategies:
        done = command(
            *("fit", "--config", recipe, *flags, "--name", strategy, "--data.batch_size", 16),
            *("--trainer.strategy", strategy, "--trainer.devices", 2),
        )
        assert done.returncode == 0, done.stderr
        (run,) = (recipe.parent / "runs" / strategy).iterdir()
        assert len(one) == 10 + 2 * 3 and logged(run, *names) == pytest.approx(one, abs=1e-3), strategy


@pytest.mark.slow
def test_words_that_are_cut_off_count_as_missed(fit, cli, recipe: Path):
    run = fit()
    flags = ("--ckpt_path", run / "checkpoints" / "best.ckpt", "--data.max_length", 8)
    out = cli("test", "--config", recipe, *flags)
    assert "words are truncated, and count as false negatives" in out
    cli("predict", "--config", recipe, *flags)
    gold = sentences(45, 2)
    right = [
        head == right_head
        for row, right in zip(predictions(run), gold)
        for head, right_head in zip(row["heads"], right["head"])
    ]
    assert len(right) == sum(len(row["words"]) for row in gold)
    (line,) = [line for line in out.splitlines() if "test/uas" in line]
    assert float(line.split("│")[2]) == pytest.approx(np.mean(right), abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": [2]}, "validation.jsonl:1: column 'head' must have a head for each of the 2 words"),
        ({"head": [2, 3]}, "validation.jsonl:1: the head of word 2 is 3, but must be the number of another word"),
        ({"head": [1, 0]}, "validation.jsonl:1: the head of word 1 is 1"),
        ({"head": ["_", 0]}, "validation.jsonl:1: the head of word 1 is '_'"),
        ({"deprel": ["root"]}, "validation.jsonl:1: there are 2 words, but 1 labels in the column 'deprel'"),
        ({"deprel": ["dog", "root"]}, "validation.jsonl:1: the relation 'dog' is not one of the training split"),
    ],
)
def test_bad_trees_are_named(fit, recipe: Path, change: dict, message: str):
    row = {"form": ["anna", "sees"], "head": [2, 0], "deprel": ["nsubj", "root"]} | change
    write(recipe.parent / "validation.jsonl", [row])
    with pytest.raises(UserError, match=message):
        fit()


def test_line_with_too_few_columns_is_named(fit, recipe: Path, tmp_path: Path):
    (tmp_path / "short.conllu").write_text("1\tanna\t_\tPROPN\t_\t_\t2\tnsubj\t_\t_\n2\tsees\t_\n\n")
    with pytest.raises(UserError, match="short.conllu:2: the line has 3 columns, but must have 10"):
        fit("--data.tables.train", tmp_path / "short.conllu")
