"""Steps that are not finite: whenever one asks, the first is named, and asking takes one number from the device."""

import pytest
import torch

from lm_lightning.data.order import PADDING
from lm_lightning.errors import UserError
from lm_lightning.models.finite import FiniteSteps


def test_first_step_that_is_not_finite_is_named_although_the_host_asks_late():
    steps = FiniteSteps()
    for step, value in enumerate([1.0, 2.0, 3.0]):
        steps.add(step, [step], torch.tensor(value))
    steps.check()
    for step, value in {3: 1.0, 4: float("inf"), 5: 1.0, 6: float("nan")}.items():
        steps.add(step, [10 * step, PADDING], torch.tensor(value))
    with pytest.raises(UserError, match=r"not finite at step 4, on the training samples \[40\]"):
        steps.check()


def test_a_check_without_new_steps_is_silent():
    steps = FiniteSteps()
    steps.check()
    steps.add(0, [0], torch.tensor(1.0))
    steps.check()
    steps.check()
