"""Overriding: what a subclass of `LanguageModule` overwrites is a hook that it may override, or is refused.

A task that by accident names something of its own as the base class does would otherwise break training silently.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from lm_lightning.errors import UserError

Function = TypeVar("Function", bound=Callable)
# Attributes that `LanguageModule.__init__` sets, once.
FIXED = frozenset(
    {"settings", "pretrained", "adapter", "optimizer_factory", "schedule", "attn_implementation"}
    | {"compile_body", "activation_checkpointing", "val_loss", "freeze_patterns", "layer_decay", "keep_head"}
    | {"optimizer_steps", "checked"}
)


def hook(function: Function) -> Function:
    """Marks a method that subclasses may override without calling it."""
    function.is_hook = True  # type: ignore[attr-defined]
    return function


def hooks(base: type) -> list[str]:
    """The names of the methods of a class that are marked as hooks."""
    return [name for name, value in vars(base).items() if hasattr(inspect.unwrap(value), "is_hook")]


def check_class(cls: type, base: type, lightning: type) -> None:
    """Checks what a class overrides of its base class.

    Args:
        cls: The class.
        base: Its base class.
        lightning: The base class of `base`. Its own hooks may be overridden if the override calls that of `base`.

    Raises:
        UserError: Names what must not be overridden.
    """
    free = {*hooks(base), "auto_class", "unused"}
    for name in vars(base).keys() - free:
        for owner in cls.__mro__[: cls.__mro__.index(base)]:
            if name.startswith("__") or name not in vars(owner):
                continue
            where, code = f"{owner.__name__}.{name}", getattr(inspect.unwrap(vars(owner)[name]), "__code__", None)
            if not hasattr(lightning, name) or code is None:
                raise UserError(
                    f"{where} overrides {base.__name__}.{name}, which is not made for it: choose another name (what "
                    "may be overridden is in docs/extending.md)"
                )
            if name not in code.co_names:
                raise UserError(f"{where} must call super().{name}(...), as {base.__name__} needs it itself")


def check_attribute(module: Any, base: type, name: str) -> None:
    """Checks that an attribute that is being set does not replace one that the base class needs.

    Raises:
        UserError: Names it.
    """
    method = inspect.isroutine(vars(base).get(name))
    if method or (name in FIXED and (name in vars(module) or name in vars(module).get("_modules", {}))):
        raise UserError(
            f"{type(module).__name__} sets self.{name}, which is {'a method' if method else 'an attribute'} of "
            f"{base.__name__}: choose another name"
        )


def refuse_early_network(module: Any) -> None:
    """Refuses a module whose network a subclass has set, as freezing, adapters and checkpoints would not know of it.

    Raises:
        UserError: Names the hook for it.
    """
    if "network_class" not in vars(module):  # which `configure_model` sets
        raise UserError(f"{type(module).__name__} sets self.network: override new_network instead, which returns it")
