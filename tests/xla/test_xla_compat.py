"""What `lm_lightning.xla.compat` replaces in transformers is there, and has its effect."""

import inspect

import torch
from transformers import masking_utils

from lm_lightning.xla import compat


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
