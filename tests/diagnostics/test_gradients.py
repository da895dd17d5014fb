"""Histograms of gradients: options that cannot work are refused before training."""

import pytest

from lm_lightning.diagnostics.gradients import Gradients
from lm_lightning.errors import UserError


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"bins": 0}], ids=str)
def test_numbers_below_one_are_refused(options: dict):
    with pytest.raises(UserError, match="but both must be 1 or more"):
        Gradients(**options)
