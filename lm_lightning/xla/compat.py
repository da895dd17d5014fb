"""transformers: masks without checks of their values. Lightning: the placement of a network by a strategy.

`XLASharded` overrides `Strategy._setup_model`, which Lightning calls when the network is on its device and before the
optimizer is created. Alternative: none. `model_to_device` is called before tied weights are tied again, and `setup`
also creates the optimizers.
"""

from transformers import masking_utils
from transformers.utils.import_utils import is_tracing


def skip_mask_checks() -> None:
    """Makes transformers assume that it is being traced, so that it does not check the values of masks.

    Otherwise the host would wait for the device at each mask. Alternative: passing 4-dimensional masks, which not all
    networks accept.
    """
    masking_utils.is_tracing = lambda tensor=None: True


def restore_mask_checks() -> None:
    """Reverts `skip_mask_checks`."""
    masking_utils.is_tracing = is_tracing
