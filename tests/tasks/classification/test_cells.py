"""Labels, lists and numbers as spreadsheets, pandas and JSON write them are read as they are meant, or refused."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lm_lightning.callbacks.predictions import cells as cells_of_predictions
from lm_lightning.callbacks.predictions import write_table
from lm_lightning.data.tokenizer import Tokenizer, train
from lm_lightning.errors import UserError
from lm_lightning.finetuning.data import LabelledData
from lm_lightning.finetuning.tables import Tables
from lm_lightning.tasks.classification.data import ClassificationData, TextColumns


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    options = Tokenizer(algorithm="wordpiece", vocab_size=60, lowercase=True)
    train(options, iter(["some text of words a b c"] * 5), "bert").save_pretrained(folder)
    return Tokenizer(str(folder))


def made(data: LabelledData, own: tuple[str, ...] = ()) -> LabelledData:
    """A data module as in a run of a network with labels of its own."""
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        lightning_module=SimpleNamespace(own_labels=lambda: list(own)),
        state=SimpleNamespace(fn="fit"),
        is_global_zero=True,
    )
    data.setup("fit")
    return data


def table(path: Path, labels: list, name: str = "label") -> str:
    """A file with a text and a label in each row, CSV as Python and pandas write it, or JSONL."""
    with open(path, "w", newline="", encoding="utf-8") as stream:
        if path.suffix == ".csv":
            csv.writer(stream).writerows([["text", name], *[[f"text {i}", value] for i, value in enumerate(labels)]])
        else:
            stream.writelines(json.dumps({"text": f"text {i}", name: v}) + "\n" for i, v in enumerate(labels))
    return str(path)


def several(tmp_path: Path, tokenizer: Tokenizer, labels: list, suffix: str = ".csv") -> tuple[list, list]:
    """The names of the labels, and those of each row."""
    file = table(tmp_path / f"a{suffix}", labels)
    data = made(ClassificationData(kind="multilabel", tables=Tables(file, file), tokenizer=tokenizer))
    rows = data.examples["validation"].rows
    return data.labels, [[n for n, told in zip(data.labels, row["targets"].tolist()) if told] for row in rows]


FORMS = {
    "pandas": ["['a', 'b c']", "[]", "['b c']", "[\"it's\", 'a']"],
    "JSON": ['["a", "b c"]', "[]", '["b c"]', '["it\'s", "a"]'],
    "separators": ["a, b c", "", "b c", "it's,a"],
    "lists": [["a", "b c"], [], [" b c"], ["it's", "a "]],
    "tuples": [["a", "b c"], None, ["b c"], ["it's", "a", "a"]],
}


@pytest.mark.parametrize("form", FORMS)
def test_lists_of_labels_are_read_in_all_forms(tmp_path: Path, tokenizer: Tokenizer, form: str, capsys):
    suffix = ".jsonl" if form in ("lists", "tuples") else ".csv"
    names, told = several(tmp_path, tokenizer, FORMS[form], suffix)
    assert names == ["a", "b c", "it's"] and told == [["a", "b c"], [], ["b c"], ["a", "it's"]]
    assert ("space around 2 labels was removed" in capsys.readouterr().out) == (form == "lists")


def test_predictions_of_several_labels_can_be_read_again(tmp_path: Path, tokenizer: Tokenizer):
    rows = [{"id": i, "text": f"text {i}", "label": names} for i, names in enumerate([["a", "b,c"], [], ["b,c"]])]
    write_table(cells_of_predictions(rows), tmp_path / "a.csv")
    file = str(tmp_path / "a.csv")
    data = made(ClassificationData(kind="multilabel", tables=Tables(file, file), tokenizer=tokenizer))
    assert data.labels == ["a", "b,c"]
    assert [row["targets"].tolist() for row in data.examples["train"].rows] == [[1, 1], [0, 0], [0, 1]]


@pytest.mark.parametrize(
    "cell", ["['a' 'b']", "['a', b]", "[a, b]", "['a', 'b'", "[" * 99_999 + "]" * 99_999, "['" + "a" * 1_000_000 + "']"]
)
def test_lists_that_cannot_be_read_are_refused_with_their_row(tmp_path: Path, tokenizer: Tokenizer, cell: str):
    if cell == "['a', 'b'":  # no list, whose parts are labels
        assert several(tmp_path, tokenizer, ["a", cell])[0] == ["'b'", "['a'", "a"]
        return
    with pytest.raises(UserError, match=r"a.csv:3: column 'label' is .* looks like a list, but cannot be parsed"):
        several(tmp_path, tokenizer, ["a", cell, "b"])


def test_an_empty_separator_is_refused():
    with pytest.raises(UserError, match="data.separator is empty"):
        ClassificationData(kind="multilabel", separator="")


def test_lists_are_no_single_label(tmp_path: Path, tokenizer: Tokenizer):
    for name, value in (("a.csv", "['a', 'b']"), ("a.jsonl", ["a"]), ("b.jsonl", {"a": 1})):
        file = table(tmp_path / name, ["a", value, "b"])
        with pytest.raises(
            UserError, match=rf"{name}:\d: column 'label' is .* must be a single label: give --data.kind"
        ):
            made(ClassificationData(tables=Tables(file, file), tokenizer=tokenizer))


@pytest.mark.parametrize(
    ("name", "labels", "names", "numbers", "told"),
    [
        ("a.csv", ["neg", "neg ", " pos", "pos"], ["neg", "pos"], [0, 0, 1, 1], "train: white space around 2 labels"),
        ("a.jsonl", [1, 1.0, "1", 0, "0.0"], ["0", "1"], [1, 1, 1, 0, 0], "train: 2 labels have several spellings"),
        (
            "b.jsonl",
            [True, "true", "TRUE", False],
            ["False", "True"],
            [1, 1, 1, 0],
            "train: 2 labels have several spellings",
        ),
        ("c.jsonl", [1.0, 1.5, 2.0], ["1.0", "1.5", "2.0"], [0, 1, 2], ""),
        ("b.csv", ["2.0", "2.1", "1.10"], ["1.10", "2.0", "2.1"], [1, 2, 0], ""),
    ],
)
def test_spellings_of_a_label_are_one(tmp_path, tokenizer, name, labels, names, numbers, told, capsys):
    file = table(tmp_path / name, labels)
    data = made(ClassificationData(tables=Tables(file, file), tokenizer=tokenizer))
    assert data.labels == names
    assert [int(row["targets"]) for row in data.examples["train"].rows] == numbers
    out = capsys.readouterr().out
    assert told in out and ("space around" in out) + ("spellings" in out) == bool(told)


def test_spellings_of_the_training_split_or_the_network_count(tmp_path: Path, tokenizer: Tokenizer, capsys):
    """pandas writes whole numbers as 1.0 where any row of the file lacks one."""
    files = [table(tmp_path / "a.csv", ["1", "0"]), table(tmp_path / "b.csv", ["1.0", "0.0", "1.0"])]
    data = made(ClassificationData(tables=Tables(*files), tokenizer=tokenizer))
    assert [int(row["targets"]) for row in data.examples["validation"].rows] == [1, 0, 1]
    assert "validation: 3 labels have several spellings" in capsys.readouterr().out
    data = made(ClassificationData(tables=Tables(*files), tokenizer=tokenizer), own=("1.0", "0.0"))
    assert data.labels == ["1.0", "0.0"] and [int(row["targets"]) for row in data.examples["train"].rows] == [0, 1]


@pytest.mark.parametrize("value", [None, "", "  ", float("nan")])
def test_a_missing_label_is_refused(tmp_path: Path, tokenizer: Tokenizer, value: object):
    file = table(tmp_path / "a.jsonl", ["a", "b", value])
    with pytest.raises(UserError, match="a.jsonl:3: the row has no label"):
        made(ClassificationData(tables=Tables(file, file), tokenizer=tokenizer))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("1,5", r" \(use a decimal point instead of the comma\)"),
        ("nan", ""),
        ("inf", ""),
        (float("nan"), r" \(it must be finite\)"),
        ("1e39", r" \(it must be finite\)"),
        (10**400, r" \(it must be finite\)"),
        ("1_000", ""),
        ("\u0661", ""),
        (True, ""),
        (None, ""),
        ("", ""),
        ([1], ""),
    ],
)
def test_what_is_no_number_is_refused_with_its_row(tmp_path: Path, tokenizer: Tokenizer, value: object, reason: str):
    file = table(tmp_path / "a.jsonl", [1, value])
    message = rf"a.jsonl:2: column 'label' is .*, but must be a number{reason}: fix"
    with pytest.raises(UserError, match=message):
        made(ClassificationData(kind="regression", tables=Tables(file, file), tokenizer=tokenizer))


def test_numbers_are_those_that_are_written(tmp_path: Path, tokenizer: Tokenizer):
    file = table(tmp_path / "a.csv", ["1", " -2.5 ", "+.5", "1e-3", "3."])
    data = made(ClassificationData(kind="regression", tables=Tables(file, file), tokenizer=tokenizer))
    told = torch.stack([row["targets"] for row in data.examples["train"].rows])
    assert torch.equal(told, torch.tensor([1, -2.5, 0.5, 1e-3, 3]))


def test_columns_of_labels_are_found(tmp_path: Path, tokenizer: Tokenizer):
    file = table(tmp_path / "a.csv", ["x", "y"], name="stars")
    with pytest.raises(UserError, match="there is no column 'label'; the columns are text, stars"):
        made(ClassificationData(tables=Tables(file, file), tokenizer=tokenizer))
    data = made(ClassificationData(TextColumns(label="stars"), tables=Tables(file, file), tokenizer=tokenizer))
    assert data.labels == ["x", "y"]
