"""Finite steps: the loss and gradient of each optimizer step flow in; if one is not finite, the run is stopped."""

from typing import Union

from torch import Tensor

from lm_lightning.data.order import PADDING
from lm_lightning.errors import UserError


class FiniteSteps:
    """Counts the optimizer steps up to the first that was not finite, on the device.

    So that, whenever the host asks, it has to fetch one number only, and can still name the step and its samples.
    """

    def __init__(self) -> None:
        self.steps: list[tuple[int, list[int]]] = []  # those that the host has not asked for yet, with their samples
        self.known = 0  # how many there were before
        self.poison: Union[Tensor, float] = 0.0  # 0, or nan from the first step on that is not finite
        self.count: Union[Tensor, int] = 0

    def add(self, step: int, samples: list[int], value: Tensor) -> None:
        """Notes a step, which is finite if `value`, () float32, is."""
        self.steps.append((step, samples))
        self.poison = self.poison + 0 * value
        self.count = self.count + self.poison.isfinite()

    def check(self) -> None:
        """Waits for the steps so far.

        Raises:
            UserError: Names the first that was not finite.
        """
        finite = int(self.count) - self.known
        if finite < len(self.steps):
            step, ids = self.steps[finite]
            samples = [sample for sample in ids if sample != PADDING]
            raise UserError(
                f"the loss or its gradient is not finite at step {step}, on the training samples {samples}: "
                "lower the learning rate, or look at these with `python -m lm_lightning prepare --config ... --show ID`"
            )
        self.known, self.steps = self.known + finite, []
