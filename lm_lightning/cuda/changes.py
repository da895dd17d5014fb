"""Changes of a network before it is sharded and gets its optimizer."""

from collections.abc import Callable
from typing import Any

from lm_lightning.errors import UserError


def add_change(pl_module: Any, callback: str, change: Callable[[Any], None]) -> None:
    """Makes a model apply a change when it has created its network.

    Raises:
        UserError: If the network exists, as Lightning's callbacks that average weights create it.
    """
    if pl_module.network is not None:
        raise UserError(f"the callback {callback} comes after one that needs the network: list {callback} before it")
    pl_module.network_changes.append(change)
