"""A profiler that prints how much time each part of a training step needs, and records a trace of some steps."""

import contextlib
import time
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist
from lightning.pytorch.profilers import Profiler

from lm_lightning.errors import UserError
from lm_lightning.files import write_text
from lm_lightning.profiling import compat

REST = "callbacks, logging"


class Profile(Profiler):
    """Measures the time of each part of a training step, and records a few steps: `--trainer.profiler Profile`.

    The table is printed at the end and saved in `profile/parts.txt`. Time within nested actions counts for the
    innermost one in the table: forward and backward, which the optimizer's step calls, do not count for the optimizer.
    On CUDA, it synchronizes after each part, which slows down training, so omit the flag if speed matters.

    The folder also has `trace-<process>.json.gz` of PyTorch's profiler (for https://ui.perfetto.dev) and, on CUDA,
    `memory-<process>.pickle`, the history of its memory (for https://pytorch.org/memory_viz).

    Args:
        folder: Folder for the files.
        skip: Number of micro-batches at the start that are not measured, 1 or more, as they warm up or compile.
        steps: Number of micro-batches after those that are recorded; they are not in the table. 0 for none.
    """

    def __init__(self, folder: str = "<run>/profile", skip: int = 5, steps: int = 3) -> None:
        super().__init__()
        if skip < 1 or steps < 0:
            raise UserError(f"trainer.profiler has skip {skip} and steps {steps}, but must have 1 and 0 or more")
        self.folder, self.skip, self.steps = Path(folder), skip, steps
        self.batches = 0  # micro-batches that have begun
        self.stack: list[tuple[str, Any]] = []  # parts in progress, the innermost last, with their marks in the trace
        self.counting = False
        self.since = 0.0  # when the innermost part began, or continued
        self.seconds = dict.fromkeys([*compat.PARTS, REST], 0.0)
        self.recorder: Optional[torch.profiler.profile] = None

    def start(self, action_name: str) -> None:
        part = next((part for part, ends in compat.PARTS.items() if action_name.endswith(ends)), None)
        if part == "data":
            self.next_batch()
        in_validation = any(outer == "validation" for outer, _ in self.stack)
        if part is None or not self.batches or (in_validation and part != "checkpoints"):
            return
        self.count()
        mark = torch.profiler.record_function(part) if self.recorder is not None else contextlib.nullcontext()
        mark.__enter__()
        self.stack.append((part, mark))

    def stop(self, action_name: str) -> None:
        if action_name == compat.EPOCH:  # actions after the last epoch are not part of a step
            self.count()
            self.counting = False
        if not self.stack:
            return
        part, mark = self.stack[-1]
        if compat.ends(part, action_name):
            self.count()
            self.stack.pop()
            mark.__exit__(None, None, None)

    def count(self) -> None:
        """Adds the time since the last call to the current part."""
        if not self.counting:
            return
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self.stack[-1][0] if self.stack else REST] += now - self.since
        self.since = now

    def next_batch(self) -> None:
        """Begins a micro-batch, and starts the recording or the table if they begin with it."""
        self.count()
        self.batches += 1
        if self.batches == self.skip and self.steps:
            self.recorder = torch.profiler.profile(
                schedule=torch.profiler.schedule(wait=0, warmup=1, active=self.steps, repeat=1),
                on_trace_ready=self.save,
                profile_memory=True,
            )
            self.recorder.start()
            compat.record_memory()
        elif self.recorder is not None:
            self.recorder.step()
        if self.batches > self.skip + self.steps and not self.counting:
            self.end_recording()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self.counting, self.since = True, time.perf_counter()

    def end_recording(self) -> None:
        """Ends the recorder, which writes its trace unless it was already written."""
        if self.recorder is not None:
            self.recorder.stop()
            self.recorder = None

    def save(self, recorder: torch.profiler.profile) -> None:
        """Writes the recording."""
        process = dist.get_rank() if dist.is_initialized() else 0
        self.folder.mkdir(parents=True, exist_ok=True)
        recorder.export_chrome_trace(str(self.folder / f"trace-{process}.json.gz"))
        compat.save_memory(self.folder / f"memory-{process}.pickle")

    def summary(self) -> str:
        counted = self.batches - self.skip - self.steps
        if counted < 1:
            return (
                f"profile: all of the {self.batches} micro-batches of the run were skipped or recorded: lower "
                "trainer.profiler.init_args.skip and steps, or train longer"
            )
        total = sum(self.seconds.values())
        rows = [(part, seconds) for part, seconds in self.seconds.items() if seconds] + [("all", total)]
        lines = [f"{part:20}{1000 * seconds / counted:10.2f} {100 * seconds / total:6.1f} %" for part, seconds in rows]
        return "\n".join([f"{'part':20}{'ms':>10}   share, of {counted} micro-batches", *lines])

    def describe(self) -> None:
        """Prints the table and writes it, once training has ended."""
        if not self.batches:
            return
        self.end_recording()
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(self.summary())
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / "parts.txt", self.summary() + "\n")
            print(f"profile: {self.folder}")
