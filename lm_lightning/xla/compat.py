"""transformers: masks that are made without looking into them. Lightning: how a strategy places a network.

`XLASharded` replaces `Strategy._setup_model`, which Lightning calls when the network is on its device and the optimizer
is not made yet. Alternative: none. `model_to_device` comes before tied weights are tied again, and `setup` makes the
optimizers, too.
"""

from transformers import masking_utils
from transformers.utils.import_utils import is_tracing


def skip_mask_checks() -> None:
    """Makes transformers believe that it is traced, so that it does not look into masks.

    The host would wait for the device at each mask. Alternative: to pass masks of 4 dimensions, which not all networks
    accept.
    """
    masking_utils.is_tracing = lambda tensor=None: True


def restore_mask_checks() -> None:
    """Ends what `skip_mask_checks` has begun."""
    masking_utils.is_tracing = is_tracing
