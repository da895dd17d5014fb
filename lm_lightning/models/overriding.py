"""Overriding: a subclass of `LanguageModule` may override hooks only; anything else is refused.

Otherwise, a task that accidentally reuses a name of the base class would break training silently.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from lm_lightning.errors import UserError

Function = TypeVar("Function", bound=Callable)
# Attributes that `LanguageModule.__init__` sets, once.
FIXED = frozenset(
    {"settings", "pretrained", "adapter", "optimizer_factory", "schedule", "attn_implementation"}
    | {"compile_body", "activation_checkpointing", "val_loss", "freeze_patterns", "layer_decay", "keep_head"}
    | {"optimizer_steps", "checked", "network_changes"}
)


def hook(function: Function) -> Function:
    """Marks a method that subclasses may override without calling it."""
    function.is_hook = True  # type: ignore[attr-defined]
    return function


def hooks(base: type) -> list[str]:
    """The names of the methods of a class that are marked as hooks."""
    return [name for name, value in vars(base).items() if hasattr(inspect.unwrap(value), "is_hook")]


def check_class(cls: type, base: type, lightning: type) -> None:
    """Checks which names of its base class a class overrides.

    Args:
        cls: The class.
        base: Its base class.
        lightning: The base class of `base`. Its hooks may be overridden if the override calls the method of `base`.

    Raises:
        UserError: Names the method or attribute that must not be overridden.
    """
    free = {*hooks(base), "auto_class", "unused"}
    for name in vars(base).keys() - free:
        for owner in cls.__mro__[: cls.__mro__.index(base)]:
            if name.startswith("__") or name not in vars(owner):
                continue
            where, code = f"{owner.__name__}.{name}", getattr(inspect.unwrap(vars(owner)[name]), "__code__", None)
            if not hasattr(lightning, name) or code is None:
                raise UserError(
                    f"{where} overrides {base.__name__}.{name}, which must not be overridden: choose another name "
                    "(docs/extending.md lists what may be overridden)"
                )
            if name not in code.co_names:
                raise UserError(f"{where} must call super().{name}(...), as {base.__name__} needs it")


@functools.cache
def methods(base: type) -> frozenset[str]:
    """The names of the methods that a class itself defines."""
    return frozenset(
        name
        for name, value in vars(base).items()
        if inspect.isroutine(value) or isinstance(value, functools.cached_property)
    )


def check_attribute(module: Any, base: type, name: str) -> None:
    """Checks that setting an attribute does not replace one that the base class needs.

    Raises:
        UserError: Names it.
    """
    method = name in methods(base)
    if method or (name in FIXED and (name in vars(module) or name in vars(module).get("_modules", {}))):
        raise UserError(
            f"{type(module).__name__} sets self.{name}, which is {'a method' if method else 'an attribute'} of "
            f"{base.__name__}: choose another name"
        )


def refuse_early_network(module: Any) -> None:
    """Refuses a module whose subclass has set the network itself, to which freezing and adapters would not be applied.

    Raises:
        UserError: Names the hook to use.
    """
    if "network_class" not in vars(module):  # `configure_model` sets it
        raise UserError(f"{type(module).__name__} sets self.network: override new_network instead, which returns it")
