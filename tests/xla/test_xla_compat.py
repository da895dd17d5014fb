"""What `lm_lightning.xla.compat` replaces in transformers and Lightning is there, and has its effect."""

import inspect

import torch
from lightning.pytorch.strategies import SingleDeviceXLAStrategy
from transformers import masking_utils

from lm_lightning.xla import compat
from lm_lightning.xla.strategy import XLASharded


def test_masks_are_not_looked_into():
    mask = torch.ones(1, 4, dtype=torch.long)
    assert masking_utils.is_tracing(mask) is False
    assert "is_tracing(padding_mask)" in inspect.getsource(masking_utils)
    compat.skip_mask_checks()
    try:
        assert masking_utils.is_tracing(mask) is True
    finally:
        compat.restore_mask_checks()
    assert masking_utils.is_tracing(mask) is False


def test_lightning_sets_the_network_up_before_its_optimizers_are_made():
    source = inspect.getsource(SingleDeviceXLAStrategy.setup)
    calls = ("set_shared_parameters(", "self._setup_model(self.model)", "self.setup_optimizers(trainer)")
    places = [source.index(call) for call in calls]
    assert places == sorted(places) and "_setup_model" in vars(XLASharded)
