"""transformers: masks that are made without looking into them."""

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
