"""Non-finite steps: stops the run at the first loss or gradient that is not finite, or counts the skipped steps."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Optional

import torch
from torch import Tensor

from lm_lightning.errors import UserError


class Copied:
    """A number on a CUDA GPU, copied to the host without waiting; `float` waits only for the copy.

    Reading the tensor itself would wait for all operations that were started since then.
    """

    def __init__(self, value: Tensor) -> None:
        self.copy = value.detach().to("cpu", non_blocking=True)  # into pinned memory
        self.copied = torch.cuda.Event()
        self.copied.record()

    def __float__(self) -> float:
        self.copied.synchronize()
        return self.copy.item()


class Step(NamedTuple):
    """An optimizer step.

    Attributes:
        number: Counted from 1.
        samples: Ids of this process's training samples in it.
        loss: Its mean loss over all processes, also NaN or infinite if only its gradient is; () float32, or a float
            after the host has read it.
    """

    number: int
    samples: list[int]
    loss: Tensor | Copied | float


class NonFiniteGuard:
    """Checks the losses of optimizer steps with a delay, because reading a value waits for the device.

    Args:
        on_nonfinite: Whether a non-finite step stops the run (`stop`), or was skipped and is counted (`skip`).
        limit: How many steps in a row may be skipped.
        gather: Returns the sample ids of all processes, given those of this one; all processes call it together.
        print: Prints a line in the first process.

    Attributes:
        pending: Steps that have not been checked yet, oldest first; append new ones here.
        checked: Finite steps that have been checked, for a callback that watches the loss, which creates this list and
            removes them; None without such a callback.
        skipped: Number of skipped steps of the run, including those before it was resumed.
    """

    def __init__(
        self,
        on_nonfinite: Literal["stop", "skip"],
        limit: int,
        gather: Callable[[list[int]], list[int]],
        print: Callable[[str], Any],
    ) -> None:
        self.on_nonfinite, self.limit = on_nonfinite, limit
        self.gather, self.print = gather, print
        self.pending: list[Step] = []
        self.checked: Optional[list[Step]] = None
        self.skipped = self.skipped_in_a_row = 0

    def check(self, keep: int = 0) -> bool:
        """Checks all pending steps except the latest `keep`; all processes must call it together.

        Returns:
            Whether they are finite.

        Raises:
            UserError: If one is not and the run must stop. Names the first such step and its samples.
        """
        stop = max(0, len(self.pending) - keep)
        due, self.pending = self.pending[:stop], self.pending[stop:]
        finite = True
        for step in due:
            loss = float(step.loss)
            if math.isfinite(loss):
                self.skipped_in_a_row = 0
                if self.checked is not None:
                    self.checked.append(step._replace(loss=loss))
            else:
                finite = False
                self.stop_or_count(step)
        return finite

    def stop_or_count(self, step: Step) -> None:
        """Stops the run at a non-finite step, or counts it as skipped."""
        samples = self.gather(step.samples)
        where = f", on the training samples {listed(samples)}" if samples else ""
        what = f"the loss or its gradient is not finite at step {step.number}{where}"
        if self.on_nonfinite == "stop" or self.skipped_in_a_row == self.limit:
            before = f" (after {self.limit} steps in a row were skipped)" if self.on_nonfinite == "skip" else ""
            inspect = ", or inspect these with `python -m lm_lightning prepare --config ... --show ID`"
            raise UserError(f"{what}{before}: lower the learning rate{inspect if samples else ''}")
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        self.print(f"skipped: {what}")


def listed(samples: list[int]) -> str:
    """Sample ids for a message, 32 of them at most."""
    return f"{samples[:32]}" + (f" and {len(samples) - 32} more" if len(samples) > 32 else "")
