"""Results of an evaluation: scores of each label and a confusion matrix, as tables and a picture in the run folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Trainer
from torch import Tensor

from lm_lightning import files
from lm_lightning.callbacks.predictions import escapes_formulas, rows_writer

DRAWN = 60  # maximum number of labels in the picture, so that it is readable


class LabelScore(NamedTuple):
    """Precision, recall and F1 of a label.

    Attributes:
        label: Its name.
        precision: Share of the rows with this prediction that have the label.
        recall: Share of the rows with this label for which it is predicted.
        f1: Harmonic mean of precision and recall.
        rows: Number of rows with this label.
    """

    label: str
    precision: float
    recall: float
    f1: float
    rows: int


def label_scores(labels: list[str], correct: Tensor, true: Tensor, predicted: Tensor) -> list[LabelScore]:
    """The scores of each label.

    Args:
        labels: Names of the labels.
        correct: Number of rows that have each label and for which it is predicted (true positives), (labels,) int64.
        true: Number of rows that have it, (labels,) int64.
        predicted: Number of rows for which it is predicted, (labels,) int64.
    """
    return [
        LabelScore(label, c / p if p else 0.0, c / t if t else 0.0, 2 * c / (t + p) if t + p else 0.0, t)
        for label, c, t, p in zip(labels, correct.tolist(), true.tolist(), predicted.tolist())
    ]


def write(results: Sequence[Any], title: str, trainer: Trainer) -> None:
    """Writes `results.csv` and `results.md` in the run folder, in the first process, unless it is a sanity check.

    Args:
        results: Named tuples of one type, such as `LabelScore`, that begin with a name and end with a number of rows.
        title: What was evaluated, the heading of `results.md`.
        trainer: The trainer of the evaluation.
    """
    if not writes_results(trainer):
        return
    folder = Path(trainer.default_root_dir)
    with files.replacing(folder / "results.csv", newline="") as file:
        write_row = rows_writer(file, escapes_formulas(trainer))
        for row in (results[0]._fields, *results):
            write_row(row)
    names = [name.replace("f1", "F1").replace("_", " ") for name in results[0]._fields]
    lines = [f"{title}\n", f"| {' | '.join(names)} |", "|---|" + "--:|" * (len(names) - 1)]
    for name, *shares, rows in results:
        label = " ".join(name.replace("|", "\\|").split())
        lines.append(f"| {' | '.join([label, *(f'{share:.3f}' for share in shares), f'{rows:,}'])} |")
    files.write_text(folder / "results.md", "\n".join(lines) + "\n")


def writes_results(trainer: Trainer) -> bool:
    """Whether this process writes results now: only the first process does, and not in the sanity check of `fit`."""
    return trainer.is_global_zero and not trainer.sanity_checking


def write_confusion(confusion: Tensor, labels: list[str], title: str, trainer: Trainer) -> None:
    """Writes `confusion.csv` in the run folder and draws `confusion.png` of up to 60 labels; see `write`.

    Args:
        confusion: Number of predictions for each true label (rows) and predicted label (columns), (labels, labels)
            int64.
        labels: Names of the labels.
        title: Title of the picture, which is drawn if matplotlib is installed.
        trainer: The trainer of the evaluation.
    """
    if not writes_results(trainer):
        return
    confusion, folder = confusion.cpu(), Path(trainer.default_root_dir)
    with files.replacing(folder / "confusion.csv", newline="") as file:
        write_row = rows_writer(file, escapes_formulas(trainer))
        write_row(["true \\ predicted", *labels])
        for label, row in zip(labels, confusion.tolist()):
            write_row([label, *row])
    if len(labels) > DRAWN:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    size = 3 + 0.45 * len(labels)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = figure.subplots()
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the row", shrink=0.8)
    names = [label.replace("$", "\\$") for label in labels]  # matplotlib would read $...$ as a formula
    names = [name if len(name) <= 24 else name[:23] + "…" for name in names]
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    for i, row in enumerate(confusion.tolist() if len(labels) <= 20 else []):
        for j, count in enumerate(row):
            colour = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, f"{count:,}", ha="center", va="center", color=colour)
    files.write_picture(folder / "confusion.png", figure)
