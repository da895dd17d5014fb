"""Results: how often labels were right in; tables and a picture in the run folder out, written at each evaluation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Trainer
from torch import Tensor

from lm_lightning import files
from lm_lightning.callbacks.predictions import escapes_formulas, rows_writer

DRAWN = 60  # labels; a picture of more could not be read


class Result(NamedTuple):
    """How well a label is told.

    Attributes:
        label: Its name.
        precision: Share of the rows told to have it that have it.
        recall: Share of the rows that have it that are told to.
        f1: Their harmonic mean.
        rows: How many have it.
    """

    label: str
    precision: float
    recall: float
    f1: float
    rows: int


def of(labels: list[str], right: Tensor, gold: Tensor, told: Tensor) -> list[Result]:
    """The results of each label.

    Args:
        labels: Their names.
        right: Rows that have each and are told to, (labels,) int64.
        gold: Rows that have it.
        told: Rows that are told to have it.
    """
    return [
        Result(label, r / t if t else 0.0, r / g if g else 0.0, 2 * r / (g + t) if g + t else 0.0, g)
        for label, r, g, t in zip(labels, right.tolist(), gold.tolist(), told.tolist())
    ]


def write(results: Sequence[Any], title: str, trainer: Trainer) -> None:
    """Writes `results.csv`, and `results.md` with the title over it.

    Args:
        results: Named tuples of one kind, such as `Result`, that begin with a name and end with a number of rows.
        title: What they are of.
        trainer: Of the evaluation; its folder is there.
    """
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


def write_confusion(confusion: Tensor, labels: list[str], title: str, trainer: Trainer) -> None:
    """Writes `confusion.csv`, how often each label was taken for which, and draws `confusion.png` of up to 60 labels.

    Args:
        confusion: (labels, labels) int64, right ones by rows.
        labels: Their names.
        title: Over the picture, which is drawn where matplotlib is installed.
        trainer: Of the evaluation; its folder is there.
    """
    folder = Path(trainer.default_root_dir)
    with files.replacing(folder / "confusion.csv", newline="") as file:
        write_row = rows_writer(file, escapes_formulas(trainer))
        write_row(["right \\ told", *labels])
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
    names = [label.replace("$", "\\$") for label in labels]  # no formulas
    names = [name if len(name) <= 24 else name[:23] + "…" for name in names]
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="told", ylabel="right", title=title)
    for i, row in enumerate(confusion.tolist() if len(labels) <= 20 else []):
        for j, count in enumerate(row):
            colour = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, f"{count:,}", ha="center", va="center", color=colour)
    files.write_picture(folder / "confusion.png", figure)
