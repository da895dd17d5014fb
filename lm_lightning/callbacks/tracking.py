"""Tracking: where the numbers go."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only


class MetricsFile(CSVLogger):
    """Lightning's CSVLogger, writing `metrics.csv` right into a folder and going on with it when a run is resumed.

    Rows of steps that the resumed run does again are replaced.

    Args:
        save_dir: The folder.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__(save_dir, name="", version="")
        self.earlier: list[dict[str, Any]] = []  # rows of the run that this one goes on with

    @property
    def experiment(self) -> Any:  # noqa: D102 (as in Lightning)
        file = Path(self.log_dir) / "metrics.csv"
        if self._experiment is None and file.exists():  # Lightning is about to remove it
            content = file.read_bytes()
            rows = csv.DictReader(content.decode().splitlines())
            self.earlier = [row for row in rows if (row.get("step") or "").isdigit()]  # a killed run may cut the last
            _ = super().experiment
            file.write_bytes(content)  # until there is a new row: the resume may yet be refused
        return super().experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: Optional[int] = None) -> None:  # noqa: D102
        writer = self.experiment
        if self.earlier:
            # A step is logged before its validation, which may be all of it that is left to do.
            rest = is_validation(metrics)
            writer.metrics = [
                row
                for row in self.earlier
                if int(row["step"]) < (step or 0) or (rest and int(row["step"]) == step and not is_validation(row))
            ]
            self.earlier = []
            (Path(self.log_dir) / "metrics.csv").unlink()
        super().log_metrics(dict(metrics), step)


def is_validation(row: Mapping[str, Any]) -> bool:
    """Whether a row of metrics comes from a validation."""
    return any(name.startswith("val/") and value not in (None, "") for name, value in row.items())
