"""Tables of predictions: the columns of the input, in its order, beside what was predicted."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from lm_lightning.callbacks.predictions import Predictions
from lm_lightning.finetuning.tables import Tables, read_files


def table(folder: Path, inputs: list, predicted: list[dict]) -> list[list[str]]:
    """The lines of `predictions.csv` for rows of a table."""
    data = SimpleNamespace(inputs=inputs, predict_table=True)
    trainer = SimpleNamespace(
        default_root_dir=folder,
        global_rank=0,
        world_size=1,
        is_global_zero=True,
        strategy=SimpleNamespace(barrier=lambda name: None),
        datamodule=data,
        loggers=[],
    )
    module, callback = SimpleNamespace(join_predictions=lambda rows: rows), Predictions()
    callback.on_predict_start(trainer, module)
    for row in reversed(predicted):  # batches have an order of their own
        callback.on_predict_batch_end(trainer, module, [row])
    callback.on_predict_end(trainer, module)
    with open(folder / "predictions.csv", newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("csv", ";"), ("tsv", "\t")])
def test_columns_of_the_input_are_kept_in_its_order(tmp_path: Path, suffix: str, delimiter: str):
    lines = [["z", "label", "id"], ["b", "x", "7"], ["a", "", "3"], ['"é', "y", "5"]]
    quoting = {"tsv": csv.QUOTE_NONE, "csv": csv.QUOTE_MINIMAL}[suffix]
    path = tmp_path / f"a.{suffix}"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter, quoting=quoting, quotechar=None if quoting else '"').writerows(lines)
    predicted = [{"id": i, "label": "y", "scores": {"x": 0.25, "y": 0.75}, "labels": ["x", "y"]} for i in range(3)]
    found = table(tmp_path, list(read_files(str(path), Tables())), predicted)
    assert [line[:3] for line in found] == lines
    assert found[0][3:] == [f"predicted.{name}" for name in ("id", "label", "scores.x", "scores.y", "labels")]
    assert [line[3:] for line in found[1:]] == [[str(i), "y", "0.25", "0.75", '["x", "y"]'] for i in range(3)]
    again = table(tmp_path, list(read_files(str(tmp_path / "predictions.csv"), Tables())), predicted)
    assert again[0] == [*found[0], *(f"predicted.{name}" for name in found[0][3:])]


def test_a_row_with_several_predictions_is_repeated(tmp_path: Path):
    """As a sentence with several predicates; files may have other columns."""
    predicted = [
        {"id": 0, "row": 0, "predicate": 1},
        {"id": 1, "row": 2, "predicate": 0},
        {"id": 2, "row": 2, "predicate": 3},
    ]
    found = table(tmp_path, [{"words": "a b"}, {"words": "c"}, {"words": "d e f g", "more": "x"}], predicted)
    assert found[0][0] == "words" and found[0][-1] == "more"
    assert [[line[0], line[3], line[-1]] for line in found[1:]] == [
        ["a b", "1", ""],
        ["d e f g", "0", "x"],
        ["d e f g", "3", "x"],
    ]
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == predicted
