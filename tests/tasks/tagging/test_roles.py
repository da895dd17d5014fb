"""Semantic roles: frames are told apart, arguments are counted as by the script of CoNLL-2005."""

import csv
import json
from pathlib import Path

import pytest
from clauses import recipe as recipe_of
from clauses import sentences, write
from conftest import evaluation

from lm_lightning.errors import UserError
from lm_lightning.finetuning.tables import Row
from lm_lightning.tasks.tagging.roles import RoleColumns, RoleData


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return recipe_of(tmp_path, "Tagging", "RoleData", "val/f1")


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ("B-A0 I-A0 B-V O B-A1", [("A0", (0, 2)), ("A1", (4, 5))]),  # without the predicate
        ("B-A1 B-V B-C-A1 I-C-A1", [("A1", (0, 1, 2, 4))]),  # an argument in two parts
        ("B-A1 B-C-A1 O B-C-A1 B-V", [("A1", (0, 1, 1, 2, 3, 4))]),
        ("B-C-A1 B-V B-A1", [("A1", (0, 1)), ("A1", (2, 3))]),  # none before it: an argument of its own
        ("B-A1 B-A1 B-C-A1 B-V", [("A1", (0, 1)), ("A1", (1, 2, 2, 3))]),  # the last one goes on
        ("B-V B-A0 B-C-V", [("A0", (1, 2))]),
        ("B-R-A0 B-A0 B-V B-AM-TMP", [("R-A0", (0, 1)), ("A0", (1, 2)), ("AM-TMP", (3, 4))]),
    ],
)
def test_arguments_are_those_of_the_conll_script(labels: str, found: list):
    assert sorted(RoleData().found(labels.split())) == sorted(found)


def predictions(run: Path) -> list[dict]:
    return [json.loads(line) for line in (evaluation(run) / "predictions.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_each_predicate_has_arguments_of_its_own_which_the_pipeline_tells_too(fit, cli, recipe: Path):
    from transformers import pipeline

    run = fit("--trainer.max_steps", 200, "--trainer.val_check_interval", 50)
    gold = sentences(45, 2)
    cli("predict", "--config", recipe, "--ckpt_path", run / "checkpoints" / "best.ckpt")
    predicted = predictions(run)
    frames = [(number, frame) for number, row in enumerate(gold) for frame in row["frames"]]
    assert [(row["row"], row["predicate"]) for row in predicted] == [(n, frame["predicate"]) for n, frame in frames]
    right = sum(sorted(row["spans"]) == sorted(frame["spans"]) for row, (_, frame) in zip(predicted, frames))
    assert right > 0.8 * len(frames) > 45  # some sentences have two

    tell = pipeline("token-classification", str(run / "model"), ignore_labels=[])
    compared = 0
    for row in predicted[:20]:
        words, predicate = gold[row["row"]]["words"], row["predicate"]
        marked = [*words[:predicate], "*", words[predicate], "*", *words[predicate + 1 :]]
        first = {word["start"]: word["entity"] for word in tell(" ".join(marked))}
        starts = [sum(len(word) + 1 for word in marked[:number]) for number in range(len(marked))]
        labels = [first[start] for start in starts]
        labels = [*labels[:predicate], labels[predicate + 1], *labels[predicate + 3 :]]
        # The pipeline takes the best label of each word, which may not be a legal sequence.
        if all(not own.startswith("I-") or own[2:] == before[2:] for before, own in zip(["O", *labels], labels)):
            assert labels == row["labels"]
            compared += 1
    assert compared >= 10


@pytest.mark.slow
def test_rows_may_be_frames_with_labels(fit, cli, recipe: Path, tmp_path: Path):
    """A frame a row, its predicate a number in a string, its labels as words: the same examples, the same run."""
    flat = {}
    for seed, (split, number) in enumerate({"train": 300, "validation": 50}.items()):
        rows = []
        for row in sentences(number, seed):
            for frame in row["frames"]:
                labels = RoleData().labels_of_frame(frame_row(frame), row["words"])
                rows.append({"w": " ".join(row["words"]), "p": str(frame["predicate"]), "bio": " ".join(labels)})
        flat[split] = tmp_path / f"{split}.tsv"
        flat[split].write_text("w\tp\tbio\n" + "".join("\t".join(row.values()) + "\n" for row in rows))
    short = ("--trainer.max_steps", 6, "--trainer.val_check_interval", 6)
    names = [f"--data.columns.{own}={name}" for own, name in {"words": "w", "predicate": "p", "labels": "bio"}.items()]
    files = [f"--data.tables.{split}={file}" for split, file in flat.items()]
    runs = [fit(*short), fit(*short, *names, *files, "--data.columns.frames", "")]
    logs = []
    for run in runs:
        with open(run / "metrics.csv", newline="") as file:
            logs.append([float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]])
    assert len(logs[0]) == 6 and logs[0] == logs[1]


def frame_row(frame: dict):
    from lm_lightning.finetuning.tables import Row

    return Row(frame, "here")


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (
            {"predicate": 2, "spans": []},
            "validation.jsonl:1, frame 1: the predicate is 2, but must be the number of a word, 0 to 1",
        ),
        ({"spans": []}, "validation.jsonl:1, frame 1: there is no column 'predicate'"),
        ({"predicate": 1, "spans": [[0, 2, "ARG0"]]}, "frame 1: .* is not a span of the words 0 to 1"),
        ({"predicate": 1, "spans": [[0, 1, "ARG0"], [1, 1, "V"]]}, "frame 1: the span .* overlaps another"),
        ({"predicate": 1, "spans": [[0, 0, "ARG9"]]}, "frame 1: the label 'B-ARG9' is not one of the training split"),
        ("sees", "validation.jsonl:1: column 'frames' is not a list of frames"),
    ],
)
def test_bad_frames_are_named(fit, recipe: Path, frame: dict | str, message: str):
    frames = [frame] if isinstance(frame, dict) else frame
    write(recipe.parent / "validation.jsonl", [{"words": ["anna", "sees"], "frames": frames}])
    with pytest.raises(UserError, match=message):
        fit()


def test_frames_without_any_argument_are_refused(fit, recipe: Path):
    frames = [{"predicate": 1, "spans": [[1, 1, "V"]]}]
    for split in ("train", "validation"):
        write(recipe.parent / f"{split}.jsonl", [{"words": ["anna", "sees"], "frames": frames}])
    with pytest.raises(UserError, match="mark no arguments, only predicates"):
        fit()


def test_a_label_of_another_scheme_has_a_remedy_that_roles_have(tmp_path: Path):
    data = RoleData()
    data.columns = RoleColumns()
    row = Row({"words": ["He", "ran"], "frames": [{"predicate": 1, "labels": ["E-ARG0", "B-V"]}]}, "rows.jsonl:1")
    with pytest.raises(UserError, match="rows.jsonl:1.*'E-ARG0' does not belong to the scheme bio.*: fix it$"):
        data.check_scheme(dict.fromkeys(data.labels_in(row), row.where))
