"""The commands about the classification of texts in the README and in docs/."""

import csv
from pathlib import Path

import pytest
from reading import Reader, under
from tables import labelled, write


@pytest.mark.slow
@under("README.md", "Your own task")
def test_own_task(reader: Reader, typed: list[list[str]]):
    sentiment(reader, typed)


@pytest.mark.slow
@under("docs/finetuning.md", "An example")
def test_example(reader: Reader, typed: list[list[str]]):
    sentiment(reader, typed)


def sentiment(reader: Reader, typed: list[list[str]]) -> None:
    """Runs commands with tables of reviews and checks the predictions."""
    for seed, (name, number) in enumerate({"train": 48, "dev": 16, "new": 7}.items()):
        rows = [{"review": row["text"], "stars": row["label"]} for row in labelled("sentiment.yaml", number, seed)]
        write(f"{name}.csv", [{"review": row["review"]} for row in rows] if name == "new" else rows)
    reader.type_all(typed)
    assert {row["label"] for row in reader.predictions()} <= {"1", "2"} and len(reader.predictions()) == 7
    (file,) = Path("runs").rglob("predictions.csv")
    with open(file, newline="", encoding="utf-8") as lines:
        assert {"review", "predicted.label", "predicted.score"} <= set(next(csv.reader(lines)))
    reader.validate()
