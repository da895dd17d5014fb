"""A logger says itself whether evaluations use it."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger

LOGGED: dict[str, list[set[str]]] = {"Plain": [], "Evaluations": []}


class Plain(CSVLogger):
    """Records which metrics it gets."""

    def log_metrics(self, metrics: dict[str, float], step: Any = None) -> None:
        LOGGED[type(self).__name__].append({*metrics})


class Evaluations(Plain):
    logs_evaluations = True


@pytest.mark.parametrize(("name", "logs"), [("Plain", False), ("Evaluations", True)])
def test_loggers_that_state_it_log_evaluations(fit, cli, recipe: Path, name: str, logs: bool):
    run = fit("--trainer.logger", f"test_loggers.{name}", "--trainer.max_steps", 3)
    assert any("train/loss" in metrics for metrics in LOGGED[name])
    LOGGED[name].clear()
    cli("validate", run, "--trainer.logger", f"test_loggers.{name}", "--trainer.limit_val_batches", 1)
    assert any("val/loss" in metrics for metrics in LOGGED[name]) == logs
