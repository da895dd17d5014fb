"""Progress: one line for the run, with its speed and the time left."""

import io
import shutil
import sys
from typing import Any, Optional

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, Timer
from tqdm import tqdm

# (tqdm adds a comma before the postfix)
FORMAT = "{desc} {n_fmt}/{total_fmt} {percentage:.0f}%, {remaining} left, {speed}{postfix}"
PLURALS = {"step": "steps", "batch": "batches"}
# Training metrics, the most important first; those that do not fit into the terminal are not shown.
NUMBERS = {
    "loss": "loss {:.4g}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "learning_rate": "learning rate {:.3g}",
    "gradient_norm": "gradient norm {:.3g}",
    "tokens": "{:,.0f} tokens",
    "mfu": "MFU {:.1%}",
    "memory": "{:.2f} GiB",
}


class Line(tqdm):
    """A line of tqdm. (tqdm itself would write `0.31 step/s` as `3.19s/step`.)"""

    @staticmethod
    def format_meter(
        n: float, total: Optional[float], elapsed: float, *, rate: Optional[float] = None, unit: str, **settings: Any
    ) -> str:
        """As tqdm's, with `speed` as a field of `bar_format`."""
        if rate is None and elapsed:
            rate = (n - settings["initial"]) / elapsed
        return tqdm.format_meter(n, total, elapsed, rate=rate, unit=unit, speed=speed(rate, unit), **settings)


class RunProgress(ProgressBar):
    """Shows a line with the optimizer steps of the run and the latest logged metrics, and a line for each evaluation.

    In a terminal, the lines stay at the bottom. In other outputs, such as a file, the first one is printed at each
    logged step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_enabled = True  # Lightning's name, read by LightningModule.print
        self.steps = self.batches = Line(disable=True)
        self.printed = -1  # the step of the last line
        self.timer: Optional[Timer] = None  # of a run whose number of steps is not known, but its time

    def enable(self) -> None:
        self.is_enabled = True

    def disable(self) -> None:  # called by Lightning in all processes but the first
        self.is_enabled = False

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self.is_enabled:
            with tqdm.external_write_mode(file=sys.stdout):
                print(*args, flush=True, **kwargs)

    def bar(self, **settings: Any) -> Line:
        terminal = sys.stdout.isatty()
        bar = Line(
            file=sys.stdout if terminal else io.StringIO(),
            ncols=columns() if terminal else None,
            nrows=20,  # else nothing is shown if the terminal does not report its height
            disable=not self.is_enabled,
            bar_format=FORMAT,
            **settings,
        )
        if terminal:
            bar.dynamic_ncols = lambda _: (columns(), None)
        return bar

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = pl_module.total_steps()
        total = int(total) if total != float("inf") else None
        timers = [c for c in trainer.callbacks if isinstance(c, Timer) and c.time_remaining() is not None]
        self.timer = timers[0] if timers and total is None else None
        self.steps = self.bar(total=total, initial=trainer.global_step, unit="step", desc="train")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        # The metrics of a step are complete only after its last hook, so they are shown at the start of the next step.
        self.advance(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.advance(trainer, ended=True)
        self.steps.close()

    def advance(self, trainer: Trainer, ended: bool = False) -> None:
        if not self.is_enabled:
            return
        step, done = trainer.global_step, trainer.global_step - self.steps.n
        due = step % trainer.log_every_n_steps == 0 or step == self.steps.total or ended
        if self.timer is not None and step:  # as many steps as are possible in `trainer.max_time` at the present speed
            passed, left = self.timer.time_elapsed(), self.timer.time_remaining() or 0
            self.steps.total = max(step, round(step * (passed + left) / max(passed, 1e-9)))
        if done or (ended and self.printed != step):
            if due:
                self.steps.set_postfix_str(self.numbers(trainer), refresh=False)
            self.steps.update(done)
            if due and not sys.stdout.isatty():
                self.print(self.steps)
                self.printed = step
            elif ended or due:
                self.steps.refresh()

    def numbers(self, trainer: Trainer) -> str:
        """The latest training metrics, as many as fit into the terminal."""
        metrics = {name[6:]: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("train/")}
        metrics.pop("seconds", None)  # the line already shows the time
        if trainer.global_step % trainer.log_every_n_steps:  # these belong to an earlier step
            for name in ("tokens_per_second", "tokens", "mfu", "memory"):
                metrics.pop(name, None)
        formats = NUMBERS | {name: f"{name} {{:.4g}}" for name in metrics if name not in NUMBERS}
        parts = [text.format(metrics[name]) for name, text in formats.items() if name in metrics]
        if not sys.stdout.isatty():
            return ", ".join(parts)
        meter = self.steps.format_dict | {"n": trainer.global_step, "rate": None, "postfix": None, "ncols": None}
        room = columns() - len(Line.format_meter(**meter)) - 4  # 2 for the comma, 2 because the line may get longer
        while parts and len(", ".join(parts)) > room:
            parts.pop()
        return ", ".join(parts)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.advance(trainer)
        self.start(
            sum(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches), "validate"
        )

    def on_validation_batch_end(self, *_: Any) -> None:
        self.batches.update()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.batches.close()
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.print(f"validation at step {trainer.global_step}: {latest(trainer, 'val/')}")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start(sum(trainer.num_test_batches), "test")

    def on_test_batch_end(self, *_: Any) -> None:
        self.batches.update()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.batches.close()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start(sum(trainer.num_predict_batches), "predict")

    def on_predict_batch_end(self, *_: Any) -> None:
        self.batches.update()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.batches.close()

    def start(self, total: int, name: str) -> None:
        self.batches = self.bar(total=total, unit="batch", desc=name, leave=False)


def speed(rate: Optional[float], unit: str) -> str:
    """A speed as text, such as `3.20 steps/s`, or `3.20 s/step` if a step takes more than a second.

    Args:
        rate: Steps or batches per second; None if unknown.
        unit: `step` or `batch`.
    """
    if not rate:
        return f"? {PLURALS[unit]}/s"
    return f"{rate:.2f} {PLURALS[unit]}/s" if rate >= 1 else f"{1 / rate:.2f} s/{unit}"


def columns() -> int:
    """Width of the terminal, 80 if it is unknown."""
    return shutil.get_terminal_size().columns


def latest(trainer: Trainer, prefix: str) -> str:
    """The latest metrics whose names begin with `prefix`, as text."""
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(prefix)}
    shown = sorted(metrics, key=lambda name: name.count("/"))  # those of single corpora last
    return ", ".join(f"{name.removeprefix(prefix)} {metrics[name]:.4g}" for name in shown)
