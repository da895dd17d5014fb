"""Finite steps: the loss of each optimizer step flows in; one that is not finite stops the run, or is counted."""

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Tensor

from lm_lightning.errors import UserError

if TYPE_CHECKING:
    from lm_lightning.models.module import LanguageModule


class Step(NamedTuple):
    """An optimizer step, its own samples of this process, and its mean loss over all, which is not finite if its
    gradient is not: () float32, or a float once it is known."""

    number: int
    samples: list[int]
    loss: Tensor | float


class FiniteSteps:
    """Keeps steps until they are asked for, since to ask makes the host wait for its device.

    Args:
        on_nonfinite: Whether a step that is not finite stops the run, or was left out and is counted.
        limit: How many steps may be left out in a row.
    """

    def __init__(self, on_nonfinite: Literal["stop", "skip"], limit: int) -> None:
        self.on_nonfinite, self.limit = on_nonfinite, limit
        self.unknown: list[Step] = []
        self.known: list[Step] = []  # finite ones, for whoever watches their losses and takes them from here
        self.skipped = self.in_a_row = 0

    def check(self, module: "LanguageModule", keep: int = 0) -> bool:
        """Asks for all steps but the latest `keep`; all processes do so together.

        Returns:
            Whether they are finite.

        Raises:
            UserError: Names the first that is not, and its samples.
        """
        stop = len(self.unknown) - keep
        asked, self.unknown = self.unknown[: max(0, stop)], self.unknown[max(0, stop) :]
        finite = True
        for step in asked:
            loss = float(step.loss)
            if math.isfinite(loss):
                self.known.append(step._replace(loss=loss))
                self.in_a_row = 0
            else:
                finite = False
                self.refuse(step, module)
        return finite

    def refuse(self, step: Step, module: "LanguageModule") -> None:
        """Stops the run or counts a step that is not finite."""
        samples = listed(module.all_samples(step.samples))
        what = f"the loss or its gradient is not finite at step {step.number}, on the training samples {samples}"
        if self.on_nonfinite == "stop" or self.in_a_row == self.limit:
            before = f" (after {self.limit} steps in a row were skipped)" if self.on_nonfinite == "skip" else ""
            raise UserError(
                f"{what}{before}: lower the learning rate, or look at these with "
                "`python -m lm_lightning prepare --config ... --show ID`"
            )
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        module.print(f"skipped: {what}")


def listed(samples: list[int]) -> str:
    """Samples for a message, which names no more than 32 of them."""
    return f"{samples[:32]}" + (f" and {len(samples) - 32} more" if len(samples) > 32 else "")
