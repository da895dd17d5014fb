"""Profile: time is counted where it is spent, and the recorded steps are in the trace."""

import gzip
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import command
from lightning.pytorch import Callback, LightningModule, Trainer


class Clock:
    """A clock that moves by a microsecond when it is read, and otherwise only when `Slow` moves it."""

    seconds = 0.0

    @classmethod
    def perf_counter(cls) -> float:
        cls.seconds += 1e-6
        return cls.seconds


class Slow(Callback):
    """Takes 20 ms after each micro-batch, 100 ms for each validation, and 5 s after the last step."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        Clock.seconds += 0.02

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Clock.seconds += 0.1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Clock.seconds += 5


@pytest.mark.slow
def test_time_is_counted_where_it_is_spent(fit, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lm_lightning.profiling.profile.time", SimpleNamespace(perf_counter=Clock.perf_counter))
    monkeypatch.setattr(f"{__name__}.Clock.seconds", 0.0)
    run: Path = fit(
        *("--trainer.profiler", "Profile", "--trainer.profiler.init_args.skip", 2),
        *(
            "--trainer.callbacks+",
            f"{__name__}.Slow",
            "--trainer.accumulate_grad_batches",
            2,
            "--trainer.val_check_interval",
            5,
        ),
    )  # 20 micro-batches: two warm up, three are recorded, the fourth and later have two validations
    text = (run / "profile" / "parts.txt").read_text()
    assert "of 15 micro-batches" in text
    parts = {m[1].strip(): float(m[2]) for m in re.finditer(r"^(\D+?) +([\d.]+) +[\d.]+ %$", text, re.MULTILINE)}
    assert {"data", "transfer", "forward", "backward", "optimizer", "validation", "checkpoints"} < parts.keys()
    assert parts["callbacks, logging"] == pytest.approx(20, abs=0.5)
    assert parts["validation"] == pytest.approx(2 * 100 / 15, abs=0.5)
    assert parts["all"] == pytest.approx(20 + 2 * 100 / 15, abs=1)  # without what came after the last step
    assert abs(sum(parts.values()) - 2 * parts["all"]) < 0.1

    with gzip.open(run / "profile" / "trace-0.json.gz", "rt") as file:
        events = [event["name"] for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"]
    assert {name: events.count(name) for name in ("data", "forward")} == {"data": 3, "forward": 3}


def test_messages_of_the_profiler_itself_are_not_shown(recipe: Path):
    result = command("fit", "--config", recipe, "--trainer.profiler", "Profile")
    assert result.returncode == 0 and "micro-batches" in result.stdout
    assert not re.search(r"USDT|profiler_start|KINETO", result.stdout + result.stderr)


def test_short_run_says_that_nothing_was_counted(fit, capsys):
    run: Path = fit("--trainer.profiler", "Profile", "--trainer.max_steps", 4)
    assert (
        "all of the 4 micro-batches of the run were skipped or recorded" in (run / "profile" / "parts.txt").read_text()
    )
