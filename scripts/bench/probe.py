"""Callbacks that measure a run of `fit` from within."""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lm_lightning.callbacks.throughput import Throughput


class Probe(Callback):
    """Measures the throughput of a run, and writes it as JSON when the training ends.

    Args:
        path: The file: `steps`; `seconds` of all of them; `first_step`, the time when the first one ended, as of
            `time.time`; `peak_mib`; `tokens_per_s` of the steps after the warm-up, and their `share_of_peak` if that is
            known; `parts`, the milliseconds of each part of a step, if the profiler is `Profile`.
        warmup: Optimizer steps at the beginning that are not measured.
    """

    def __init__(self, path: str, warmup: int = 5) -> None:
        self.path, self.warmup = Path(path), warmup
        self.tokens = self.targets = 0
        self.marks: list[tuple[float, int, int]] = []  # at the end of each step: time, and tokens and targets so far

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begin = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict, batch_idx: int
    ) -> None:
        self.tokens += batch["input_ids"].numel()
        self.targets += batch["targets"].numel()
        if trainer.global_step > len(self.marks):
            if not self.marks:
                self.first_step = time.time()
            if len(self.marks) == self.warmup or trainer.global_step == trainer.max_steps:
                wait()
            self.marks.append((time.perf_counter(), self.tokens, self.targets))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        end = self.marks[-1]
        measured = {"steps": len(self.marks), "seconds": end[0] - self.begin, "first_step": self.first_step}
        measured |= {"peak_mib": peak_mib(), "parts": parts(trainer.profiler)}
        if len(self.marks) > self.warmup + 1:
            seconds, tokens, targets = (last - first for last, first in zip(end, self.marks[self.warmup]))
            measured["tokens_per_s"] = tokens / seconds
            (count,) = (callback for callback in trainer.callbacks if isinstance(callback, Throughput))
            if count.peak:
                flops = tokens * count.flops_per_token + targets * count.flops_per_target
                measured["share_of_peak"] = flops / seconds / count.peak
        self.path.write_text(json.dumps(measured | self.more()), encoding="utf-8")

    def more(self) -> dict[str, Any]:
        """More figures."""
        return {}


class Overhead(Probe):
    """Compares the time of steps of `fit` with that of the same steps in a bare loop, which take turns.

    The bare loop calls the model's loss, `backward` and the optimizer with batches that are already loaded.

    Args:
        path: See `Probe`. The file also has `fit_ms` and `bare_ms`: the time of a step, for each turn.
        warmup: See `Probe`.
        turn: Optimizer steps of a turn.
    """

    def __init__(self, path: str, warmup: int = 5, turn: int = 10) -> None:
        super().__init__(path, warmup)
        self.turn = turn
        self.batches: list[dict] = []
        self.fit_ms, self.bare_ms = list[float](), list[float]()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.batches.append(batch)
        if len(self.marks) == self.warmup:
            self.bare(trainer, pl_module)  # its own warm-up
        elif len(self.marks) > self.warmup and len(self.batches) == self.turn:
            wait()
            fit = time.perf_counter() - self.since
            self.bare(trainer, pl_module)
            self.fit_ms.append(1000 * fit / self.turn)
            self.bare_ms.append(1000 * (self.since - self.bare_start) / self.turn)
        else:
            return
        self.batches = []

    def bare(self, trainer: Trainer, module: LightningModule) -> None:
        """The bare loop."""
        (optimizer,) = trainer.optimizers
        wait()
        self.bare_start = time.perf_counter()
        for batch in self.batches:
            optimizer.zero_grad()
            with trainer.precision_plugin.forward_context():
                loss, targets = module.loss(batch)
            (loss / targets).backward()
            optimizer.step()
        wait()
        self.since = time.perf_counter()

    def more(self) -> dict[str, Any]:
        return {"fit_ms": self.fit_ms, "bare_ms": self.bare_ms}


def wait() -> None:
    """Waits for a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_mib() -> float:
    """Peak memory of this process: of a GPU's tensors, else the resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def parts(profiler: Any) -> dict[str, float]:
    """Milliseconds of each part of a step, if the profiler is this project's."""
    seconds = getattr(profiler, "seconds", None)
    counted = getattr(profiler, "batches", 0) - getattr(profiler, "skip", 0) - getattr(profiler, "steps", 0)
    if not isinstance(seconds, dict) or counted < 1:
        return {}
    return {name: 1000 * value / counted for name, value in seconds.items() if value}
