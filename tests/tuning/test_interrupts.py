"""Ctrl-C ends `tune` and `verify` with all the processes that they have started."""

from pathlib import Path

import pytest
from interrupts import interrupt_at_any_time


@pytest.mark.slow
@pytest.mark.parametrize("args", [["tune", "--find", "lr"], ["verify", "--only", "ddp"]], ids=" ".join)
def test_interrupt_at_any_time_ends_a_command_and_its_processes(args: list[str], recipe: Path, tmp_path: Path):
    interrupt_at_any_time([*args, "--config", recipe, "--trainer.max_steps", "100000"], tmp_path / "caches")
