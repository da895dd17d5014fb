"""Steps that are not finite: however late one asks, the first is named."""

from types import SimpleNamespace

import pytest
import torch

from lm_lightning.errors import UserError
from lm_lightning.models.nonfinite import FiniteSteps, Step


@pytest.fixture
def module() -> SimpleNamespace:
    printed: list[str] = []
    return SimpleNamespace(all_samples=lambda own: own, print=printed.append, printed=printed)


def add(steps: FiniteSteps, **losses: float) -> None:
    for name, loss in losses.items():
        number = int(name.removeprefix("step"))
        steps.unknown.append(Step(number, [10 * number], torch.tensor(loss)))


def test_first_step_that_is_not_finite_is_named_although_the_host_asks_late(module):
    steps = FiniteSteps("stop", 10)
    add(steps, step1=1.0, step2=2.0, step3=3.0)
    assert steps.check(module)
    assert [(step.number, step.loss) for step in steps.known] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    add(steps, step4=1.0, step5=float("inf"), step6=1.0, step7=float("nan"))
    with pytest.raises(UserError, match=r"not finite at step 5, on the training samples \[50\]"):
        steps.check(module)


def test_latest_steps_are_not_asked_for(module):
    steps = FiniteSteps("stop", 10)
    add(steps, step1=1.0, step2=float("nan"))
    assert steps.check(module, keep=1)
    assert steps.check(module, keep=1)
    with pytest.raises(UserError, match="step 2"):
        steps.check(module)


def test_some_steps_in_a_row_may_be_skipped(module):
    steps = FiniteSteps("skip", 2)
    add(steps, step1=float("nan"), step2=float("inf"), step3=1.0, step4=float("nan"))
    assert not steps.check(module)
    assert steps.skipped == 3 and len(module.printed) == 3 and "step 1" in module.printed[0]
    add(steps, step5=float("nan"), step6=float("nan"))
    with pytest.raises(UserError, match="step 6.*after 2 steps in a row"):
        steps.check(module)
