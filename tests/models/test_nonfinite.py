"""Steps that are not finite: the first is named, however late the host reads the losses."""

from collections.abc import Callable
from typing import Literal

import pytest
import torch

from lm_lightning.errors import UserError
from lm_lightning.models.nonfinite import NonFiniteGuard, Step


def guard(on_nonfinite: Literal["stop", "skip"], limit: int, print: Callable[[str], None] = print) -> NonFiniteGuard:
    return NonFiniteGuard(on_nonfinite, limit, lambda own: own, print)


def add(steps: NonFiniteGuard, **losses: float) -> None:
    for name, loss in losses.items():
        number = int(name.removeprefix("step"))
        steps.pending.append(Step(number, [10 * number], torch.tensor(loss)))


def test_first_step_that_is_not_finite_is_named_although_the_host_asks_late():
    steps = guard("stop", 10)
    steps.checked = []
    add(steps, step1=1.0, step2=2.0, step3=3.0)
    assert steps.check()
    assert [(step.number, step.loss) for step in steps.checked] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    add(steps, step4=1.0, step5=float("inf"), step6=1.0, step7=float("nan"))
    with pytest.raises(UserError, match=r"not finite at step 5, on the training samples \[50\]"):
        steps.check()


def test_latest_steps_are_not_checked_yet():
    steps = guard("stop", 10)
    add(steps, step1=1.0, step2=float("nan"))
    assert steps.check(keep=1)
    assert steps.check(keep=1)
    with pytest.raises(UserError, match="step 2"):
        steps.check()


def test_some_steps_in_a_row_may_be_skipped():
    printed: list[str] = []
    steps = guard("skip", 2, printed.append)
    add(steps, step1=float("nan"), step2=float("inf"), step3=1.0, step4=float("nan"))
    assert not steps.check()
    assert steps.skipped == 3 and len(printed) == 3 and "step 1" in printed[0]
    add(steps, step5=float("nan"), step6=float("nan"))
    with pytest.raises(UserError, match="step 6.*after 2 steps in a row"):
        steps.check()
