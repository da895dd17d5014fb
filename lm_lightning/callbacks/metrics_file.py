"""Writes the logged metrics to metrics.csv."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment

from lm_lightning.callbacks.metrics_reader import csv_rows
from lm_lightning.compat import lightning as compat
from lm_lightning.errors import UserError
from lm_lightning.files import replacing


class MetricsFile(CSVLogger):
    """Lightning's CSVLogger, which writes `metrics.csv` into a folder and continues it when a run is resumed.

    Rows of steps that the resumed run repeats are replaced.

    Args:
        save_dir: The folder.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__(save_dir, name="", version="")

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:  # noqa: D102 (as in Lightning)
        return compat.writer_of(self, lambda: Rows(self.log_dir))


class Rows(ExperimentWriter):
    """Lightning's writer of the file, which does not remove rows until there are new ones to replace them."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.earlier: list[dict[str, Any]] = []  # rows of the resumed run
        if os.path.exists(self.metrics_file_path):
            columns, rows = self.read_rows()
            # A killed run may have left an incomplete last row.
            self.earlier = [row for row in rows if row.get("step", "").isdecimal()]
            self.metrics_keys = columns if self.earlier else []

        if not self.earlier and os.path.islink(self.metrics_file_path):  # its target would be changed
            os.remove(self.metrics_file_path)

    def _check_log_dir_exists(self) -> None:
        """Does nothing: Lightning removes the file here, although the resumed run may still be refused or killed."""

    def log_metrics(self, metrics_dict: dict[str, Any], step: Optional[int] = None) -> None:  # noqa: D102
        if self.earlier:
            # A step is logged before its validation, which may be the only part that is repeated.
            rest = is_validation(metrics_dict)
            self.rewrite(
                [
                    row
                    for row in self.earlier
                    if int(row["step"]) < (step or 0) or (rest and int(row["step"]) == step and not is_validation(row))
                ]
            )
            self.earlier = []
        super().log_metrics(metrics_dict, step)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self.rewrite([row for row in self.read_rows()[1] if row.get("step")])

    def read_rows(self) -> tuple[list[str], list[dict[str, str]]]:
        """The names of the file's columns, and its rows.

        Raises:
            UserError: If it is not a CSV file in UTF-8.
        """
        try:
            with open(self.metrics_file_path, newline="", encoding="utf-8") as file:
                columns, *rows = [*csv_rows(file)] or [[]]
        except ValueError as error:
            raise UserError(f"{self.metrics_file_path} cannot be continued ({error}): move it away") from error
        if columns is None or None in rows:
            raise UserError(f"{self.metrics_file_path} cannot be continued (it is not a table): move it away")
        return columns, [dict(zip(columns, row or [])) for row in rows]

    def rewrite(self, rows: list[dict[str, Any]]) -> None:
        """Replaces the file by one with these rows."""
        with replacing(Path(self.metrics_file_path), newline="") as file:
            writer = csv.DictWriter(file, self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)


def is_validation(row: Mapping[str, Any]) -> bool:
    """Whether a row of metrics comes from a validation."""
    return any(name.startswith("val/") and value not in (None, "") for name, value in row.items())
