"""Reads metrics.csv, which `callbacks/metrics_file.py` writes."""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Optional

from lm_lightning.security.bounded import text_of

Points = list[tuple[int, float]]  # (step, value), by ascending steps

ROWS = 500_000  # maximum number of rows to read, the last ones of the file
COLUMNS = 200  # maximum number of columns to read
NAME = 200  # maximum number of characters of a column's name


def read_metrics(file: Path, notes: Optional[list[str]] = None) -> dict[str, Points]:
    """Reads metrics.csv, even while a run is writing it; an incomplete last row is omitted.

    Args:
        file: Path of the file. If it does not exist, the result is empty.
        notes: A list to which a sentence is added for everything that could not be read.

    Returns:
        For each metric, such as `val/loss`, its values by ascending steps.
    """
    notes = [] if notes is None else notes
    metrics: dict[str, dict[int, float]] = {}
    *lines, rest = text_of(file, notes, last=True).split("\n")
    bad = int(bool(rest))  # (its last number may be incomplete)
    if len(lines) > ROWS + 1:
        notes.append(f"{file.name}: only the last {ROWS:,} of {len(lines) - 1:,} rows are shown")
        lines = [lines[0], *lines[-ROWS:]]
    columns: list[str] = []
    for row in csv_rows(lines):
        if not columns and row:
            columns = row[:COLUMNS]
            if len(row) > COLUMNS:
                notes.append(f"{file.name}: {len(row) - COLUMNS} of {len(row)} columns are omitted")
            continue
        if row == []:
            continue
        cells = dict(zip(columns, row or []))
        try:
            step = step_of(cells.pop("step", ""))
            values = {name: float(value) for name, value in cells.items() if 0 < len(name) <= NAME and value}
        except (TypeError, ValueError):
            bad += 1
            continue
        for name, value in values.items():
            metrics.setdefault(name, {})[step] = value
    if bad:
        notes.append(f"{file.name}: incomplete or damaged rows are omitted ({bad})")
    return {name: sorted(points.items()) for name, points in metrics.items()}


def csv_rows(lines: Iterable[str]) -> Iterator[Optional[list[str]]]:
    """The rows of a CSV file; None for a row that cannot be read, such as one with a cell of more than 128 KiB."""
    csv.field_size_limit(1 << 17)  # a global setting, which may have been raised to read tables of long texts
    reader = csv.reader(line.replace("\0", "") for line in lines)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error:
            yield None
        else:
            yield row


def step_of(value: Any) -> int:
    """Converts a value to a number of steps.

    Raises:
        ValueError: If a run cannot have that many steps; also TypeError and OverflowError.
    """
    step = int(value)
    if not 0 <= step < 1 << 53:
        raise ValueError(f"{step} is not a number of steps")
    return step
