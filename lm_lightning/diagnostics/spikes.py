"""Spikes: finds the training samples that cause loss spikes."""

import json
import statistics
from collections import deque
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lm_lightning.errors import UserError
from lm_lightning.files import append, write_text
from lm_lightning.models.nonfinite import Step, listed


class Spikes(Callback):
    """Reports steps whose loss is far above the losses before, in the console and in `spikes.jsonl` of the run folder.

    `python -m lm_lightning prepare --config ... --show ID` prints the samples.

    Args:
        deviations: Minimum distance from the mean loss of the previous steps, in standard deviations (a standard
            deviation counts as at least 1 % of the mean).
        steps: Number of previous steps. The first 20 steps of a run are not checked.
    """

    def __init__(self, deviations: float = 6.0, steps: int = 100) -> None:
        self.deviations = deviations
        self.losses: deque[float] = deque(maxlen=steps)

    def file(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / "spikes.jsonl"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.optimizer_steps.nonfinite.checked = []
        file = self.file(trainer)
        if trainer.is_global_zero and file.exists():  # remove steps that the resumed run repeats
            rows = file.read_text(encoding="utf-8").splitlines(keepends=True)
            complete = [row for row in rows if row.endswith("\n")]  # a killed run may have left an incomplete last row
            try:
                kept = [row for row in complete if json.loads(row)["step"] <= trainer.global_step]
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise UserError(f"{file} cannot be continued, as it is damaged: move it away") from error
            write_text(file, "".join(kept))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        guard = pl_module.optimizer_steps.nonfinite
        steps, guard.checked = guard.checked, []
        for step in steps:
            if len(self.losses) >= min(20, self.losses.maxlen or 20):
                mean = statistics.fmean(self.losses)
                if step.loss > mean + self.deviations * max(statistics.pstdev(self.losses), 0.01 * abs(mean)):
                    self.report(trainer, pl_module, step, mean)
            self.losses.append(step.loss)

    def report(self, trainer: Trainer, pl_module: LightningModule, step: Step, before: float) -> None:
        samples = pl_module.optimizer_steps.nonfinite.gather(step.samples)
        row = {"step": step.number, "loss": step.loss, "mean_before": before, "samples": samples}
        if trainer.is_global_zero:
            append(self.file(trainer), json.dumps(row) + "\n")
        pl_module.print(
            f"spike: the loss is {step.loss:.4g} at step {step.number} (before: {before:.4g}), on the training samples "
            f"{listed(samples)}"
        )

    def state_dict(self) -> dict:
        return {"losses": list(self.losses)}

    def load_state_dict(self, state: dict) -> None:
        self.losses.extend(state["losses"])
