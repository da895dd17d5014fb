"""The additions of examples/, which are selected by their class paths alone."""

import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, needs
from reading import Reader, in_a_process, under

from lm_lightning.errors import UserError


@pytest.fixture
def additions(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> Reader:
    """A reader whose folder has the examples and a text with reviews."""
    shutil.copytree(ROOT / "examples", "examples", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.syspath_prepend(Path.cwd())
    draw = random.Random(0)
    words = ["awful", "poor", "fair", "good", "lovely"]
    for name, number in (("train.txt", 400), ("new.txt", 20)):
        stars = [draw.randint(1, 5) for _ in range(number)]
        lines = [f"{n}/5 the film {i} was {words[n - 1]} in the morning" for i, n in enumerate(stars)]
        Path(name).write_text("\n".join(lines) + "\n")
    return reader


@needs("finetuning")
@under("docs/extending.md", "A task")
@pytest.mark.slow
def test_a_task(additions: Reader, typed: list[list[str]]):
    fit, validate, predict = typed
    learn = ["--model.optimizer.lr", "0.001", "--trainer.max_epochs", "8"]  # the reader's BERT knows nothing yet
    additions.type([*fit, *learn])
    run = additions.fitted[-1]
    assert additions.logged("val/mae")[-1] < 0.5 and all(map(math.isfinite, additions.logged("train/distance")))
    assert torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["optimizer_states"]
    with pytest.raises(UserError, match="names .*--trust_package examples"):
        additions.run("validate", run)
    additions.run = in_a_process  # which reads --trust_package
    assert "val/mae" in additions.type(validate)
    additions.type(predict)
    found = [row["stars"] for row in additions.predictions()]
    told = [int(line[0]) for line in Path("new.txt").read_text().splitlines()]
    assert sum(abs(a - b) for a, b in zip(found, told)) / len(told) < 0.5


@under("docs/extending.md", "A file format")
def test_a_format(additions: Reader, typed: list[list[str]]):
    (out,) = additions.type_all(typed)
    assert "400" in out
    Path("train.txt").write_text("4/5 good\nno stars\n")
    with pytest.raises(UserError, match="train.txt:2: the line does not begin with stars"):
        additions.type(typed[0])


@under("docs/extending.md", "A callback")
def test_a_callback(additions: Reader, typed: list[list[str]]):
    additions.type_all(typed)
    distances = additions.logged("train/distance")
    assert distances and all(0 < value < 100 for value in distances)


@under("docs/extending.md", "An optimizer")
def test_an_optimizer(additions: Reader, typed: list[list[str]]):
    additions.type_all(typed)
    (state,) = torch.load(additions.fitted[-1] / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"]
    assert all("momentum" in values for values in state["state"].values())


@pytest.mark.slow
@under("docs/extending.md", "A strategy")
def test_a_strategy(additions: Reader, typed: list[list[str]]):
    additions.run = in_a_process
    additions.type_all(typed)
    half = additions.logged("train/loss")
    additions.type([*typed[0][:-1], "ddp"])
    assert half == pytest.approx(additions.logged("train/loss"), abs=0.01)


def test_each_example_is_short():
    for file in (ROOT / "examples").glob("*.py"):
        assert len(file.read_text(encoding="utf-8").splitlines()) < 60, file
