"""Progress: one bar for the whole run, with its speed and the time left."""

import io
import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm


class RunProgress(ProgressBar):
    """A bar over the optimizer steps of the run with the latest logged metrics, and one over each evaluation.

    Where the output is no terminal, the same comes as a line at each logged step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_enabled = True  # Lightning's name, read by LightningModule.print
        self.steps = self.batches = tqdm(disable=True)

    def enable(self) -> None:
        self.is_enabled = True

    def disable(self) -> None:  # Lightning calls it on all processes but the first
        self.is_enabled = False

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self.is_enabled:
            with tqdm.external_write_mode(file=sys.stdout):
                print(*args, flush=True, **kwargs)

    def bar(self, **settings: Any) -> tqdm:
        terminal = sys.stdout.isatty()
        return tqdm(
            file=sys.stdout if terminal else io.StringIO(),
            dynamic_ncols=terminal,
            disable=not self.is_enabled,
            bar_format="{desc} {n_fmt}/{total_fmt} {percentage:3.0f}% [{elapsed}<{remaining}, {rate_fmt}] {postfix}",
            **settings,
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = pl_module.total_steps()
        total = int(total) if total != float("inf") else None
        self.steps = self.bar(total=total, initial=trainer.global_step, unit="step", desc="train")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        # The metrics of a step are there only after its last hook: here, at the start of the next one.
        self.advance(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.advance(trainer)
        self.steps.close()

    def advance(self, trainer: Trainer) -> None:
        done = trainer.global_step - self.steps.n
        if done and self.is_enabled:
            self.steps.update(done)
            if trainer.global_step % trainer.log_every_n_steps == 0:
                self.steps.set_postfix_str(latest(trainer, "train/"))
                if not sys.stdout.isatty():
                    self.print(self.steps)

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


def latest(trainer: Trainer, prefix: str) -> str:
    """The latest metrics whose names begin with `prefix`, as text, but for the time, which a bar has already."""
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(prefix)}
    metrics.pop("train/seconds", None)
    return ", ".join(f"{name.removeprefix(prefix)} {value:.4g}" for name, value in metrics.items())
