"""Metrics are sums over processes and batches."""

import math

import pytest
import torch

from lm_lightning.models.metrics import Ratio


def test_sums_of_many_rows_are_exact():
    """In float32, a count would stay at 2^24, and a sum of many small losses would drift."""
    ratio = Ratio()
    ratio.update(torch.tensor(2.0**24), torch.tensor(2**24))
    for _ in range(1000):
        ratio.update(torch.tensor(0.1), torch.tensor(1))
    expected = (2**24 + 100) / (2**24 + 1000)
    assert ratio.compute().item() == pytest.approx(expected, rel=1e-7)
    ratio.update(torch.tensor(math.nan), torch.tensor(1))
    assert ratio.compute().isnan()
