"""Predictions: a JSON line for each sample, and a CSV table if the samples came from a table."""

import csv
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lm_lightning.data import contract
from lm_lightning.data.order import PADDING
from lm_lightning.files import remove, replacing

TABLE_ROWS = 10_000  # maximum number of rows of a table in W&B
FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")  # characters with which formulas of spreadsheet programs begin
NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)


class Predictions(Callback):
    """Writes the predictions to `predictions.jsonl` in the run folder, in the order of the data.

    `predict_step` returns them as dicts. Each process writes a part, without the rows that only pad a batch (`id` is
    `PADDING`). The first process joins the parts by the `id` of the samples, since tensor-parallel processes predict
    the same ones; the module may also join several predictions of one sample (`join_predictions`). If the samples came
    from CSV or TSV files (`predict_table` of the data), `predictions.csv` has their columns and rows in the same order,
    with the predictions in additional columns such as `predicted.label`.

    Args:
        escape_formulas: Whether to insert a ' before each text and name in `predictions.csv`, `results.csv` and
            `confusion.csv` that starts with =, +, -, @ or a tab, as a spreadsheet program would run it as a formula.
            Numbers such as -1.5 are not changed.
    """

    def __init__(self, escape_formulas: bool = False) -> None:
        self.escape_formulas = escape_formulas

    def part(self, trainer: Trainer, rank: int) -> Path:
        """The file of a process."""
        return Path(trainer.default_root_dir) / f"predictions.{rank}.jsonl"

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        part = self.part(trainer, trainer.global_rank)
        remove(part)
        self.file = open(part, "x", encoding="utf-8")  # noqa: SIM115 (see the end)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: list[dict], *_: Any, **__: Any
    ) -> None:
        rows = (row for row in outputs if row["id"] != PADDING)
        self.file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.file.close()
        trainer.strategy.barrier("predictions")
        if not trainer.is_global_zero:
            return
        parts = [self.part(trainer, rank) for rank in range(trainer.world_size)]
        lines = {
            json.loads(line)["id"]: line
            for part in parts
            for line in part.read_text(encoding="utf-8").split("\n")
            if line
        }
        rows = pl_module.join_predictions([json.loads(lines[sample]) for sample in sorted(lines)])
        file = Path(trainer.default_root_dir) / "predictions.jsonl"
        with replacing(file) as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for part in parts:
            part.unlink()
        print(f"predictions: {file}")
        table = cells(rows)
        if contract.optional(trainer.datamodule, "predict_table"):
            inputs = [trainer.datamodule.inputs[row.get("row", row["id"])] for row in rows]
            write_table(append_columns(inputs, table), file.with_suffix(".csv"), self.escape_formulas)
            print(f"predictions: {file.with_suffix('.csv')}")
        for logger in trainer.loggers:
            if table and hasattr(logger, "log_text"):  # tables, as Lightning's WandbLogger has them
                data = [list(row.values()) for row in table[:TABLE_ROWS]]
                logger.log_text("predictions", list(table[0]), data)
                if len(table) > TABLE_ROWS:
                    print(f"W&B: the table has the first {TABLE_ROWS:,} of {len(table):,} predictions")


def cells(rows: list[dict]) -> list[dict[str, Any]]:
    """Converts predictions to rows of a table. Each score gets a column such as `scores.good`; lists become JSON."""
    flat = []
    for row in rows:
        found: dict[str, Any] = {}
        for name, value in row.items():
            if isinstance(value, dict):
                found |= {f"{name}.{key}": item for key, item in value.items()}
            else:
                found[name] = json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
        flat.append(found)
    return flat


def append_columns(inputs: Sequence[Mapping[str, Any]], table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Appends the columns of one table to another; they are renamed where both have the same name."""
    columns = {column for row in inputs for column in row}
    prefix = "predicted."
    while any(column.startswith(prefix) for column in columns):
        prefix = f"predicted.{prefix}"
    return [{**given, **{prefix + name: value for name, value in row.items()}} for given, row in zip(inputs, table)]


def write_table(table: list[dict[str, Any]], file: Path, escape: bool = False) -> None:
    """Writes rows as CSV; columns that a row lacks are empty in it.

    Args:
        table: The rows.
        file: File to write or replace.
        escape: Whether to escape cells that would be formulas.
    """
    names = list(dict.fromkeys(column for row in table for column in row))
    with replacing(file, newline="") as stream:
        writer = rows_writer(stream, escape)
        writer(names)
        for row in table:
            writer([row.get(name, "") for name in names])


def rows_writer(stream: IO[str], escape: bool) -> Callable[[Iterable[Any]], Any]:
    """Creates a function that writes a row of cells to a CSV file.

    Args:
        stream: The file, opened with `newline=""`.
        escape: Whether to escape cells that would be formulas.
    """
    write = csv.writer(stream).writerow
    return (lambda row: write(map(without_formula, row))) if escape else write


def escapes_formulas(trainer: Trainer) -> bool:
    """Whether formulas are escaped in the tables of a run, see `Predictions`."""
    return any(callback.escape_formulas for callback in trainer.callbacks if isinstance(callback, Predictions))


def without_formula(value: Any) -> Any:
    """Escapes a cell that spreadsheet programs would run as a formula: text gets a `'`, numbers stay unchanged."""
    if isinstance(value, str) and value.startswith(FORMULA) and not NUMBER.fullmatch(value):
        return f"'{value}"
    return value
