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

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: Optional[int] = None) -> None:
        if self._experiment is None:
            file = Path(self.log_dir) / "metrics.csv"
            rows = list(csv.DictReader(file.open(newline=""))) if file.exists() else []
            self.experiment.metrics = [row for row in rows if int(row["step"]) < (step or 0)]
        super().log_metrics(metrics, step)
