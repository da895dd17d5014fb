"""Decides which classes a config may import: any for a config of `--config`, only known ones for a run's own config.

`validate RUN`, `test RUN` and `predict RUN` use the run's config.yaml, which may be from somebody else and may not have
been checked. For such a config, only harmless classes of known packages are imported, see SECURITY.md.
"""

import contextlib
import functools
import inspect
import pydoc
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, TypeVar

from lm_lightning.compat.jsonargparse import guard_imports
from lm_lightning.console import printable
from lm_lightning.errors import UserError
from lm_lightning.security.trust import trusted_packages

T = TypeVar("T")
PACKAGES = ("lm_lightning", "lightning", "torch", "torchmetrics", "transformers", "bitsandbytes")
# Options that say where classes of Lightning and of this package write files
FOLDERS = ("dirpath", "save_dir", "folder", "filename")
PATH = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)+")  # an import path


@dataclass
class State:
    """The restrictions of imports.

    Args:
        config: The run's config; None if everything may be imported.
        named: Import paths that the user has given, in flags or in a config of `--config`.
        refused: The first import path that was refused.
    """

    config: Optional[Path] = None
    named: set[str] = field(default_factory=set)
    refused: Optional[str] = None


state = State()


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """Removes the restrictions when a command ends."""
    global state
    before, state = state, State()
    try:
        yield
    finally:
        state = before


def restrict(config: Path, arguments: Iterable[str] = ()) -> None:
    """From now on, allows only imports of harmless classes and of names that the user has given.

    Args:
        config: The run's config, for messages.
        arguments: The user's flags and configs, which may name other classes.
    """
    state.config = config
    for argument in arguments:
        state.named |= set(PATH.findall(argument))


def check() -> None:
    """Refuses the config if it requested an import that is not allowed; jsonargparse may have ignored that error.

    Raises:
        UserError: Names the import and the option that allows it.
    """
    if state.refused is not None:
        name = state.refused
        raise UserError(
            f"{state.config} names {printable(name)[:200]}, whose import may run any code (it is not a model, data "
            f"module, callback, optimizer or similar class of {', '.join(PACKAGES)}): read it, and if you trust it, "
            f"add --trust_package {printable(name.partition('.')[0])[:100]} to the command"
        )


def check_folders(options: Any, arguments: Iterable[str]) -> None:
    """Refuses a run's own config if it makes a profiler, callback or similar class write outside of the run folder.

    Args:
        options: Options of the trainer, or a part of them.
        arguments: The user's flags, which may set such options.

    Raises:
        UserError: Names the folder.
    """
    if state.config is None:
        return
    for name, value in options.items() if hasattr(options, "items") else enumerate(options):
        name = str(name).rpartition(".")[2]
        if name in FOLDERS and isinstance(value, str) and not any(f".{name}" in argument for argument in arguments):
            path = Path(value).expanduser()
            if path.is_absolute() or ".." in path.parts:
                raise UserError(
                    f"{state.config} writes files to {printable(value)[:200]}: give that folder with a flag that "
                    f"ends with .{name}, or remove it from the config"
                )
        elif isinstance(value, list) or hasattr(value, "items"):
            check_folders(value, arguments)


def trusted(name: str) -> bool:
    """Whether the user has named an import path or allowed its package."""
    packages = trusted_packages()
    return name in state.named or any(f"{name}.".startswith(f"{package}.") for package in packages if package)


def known(name: str) -> bool:
    """Whether an import path belongs to a known package, so that it may be imported in order to check it."""
    first, *rest = name.split(".")
    return first in PACKAGES and not any(part.startswith("__") for part in rest)


def harmless(found: Any) -> bool:
    """Whether an imported object is a class that can be instantiated without running code that its options choose."""
    import torch
    from lightning.fabric.accelerators import Accelerator
    from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment, Precision
    from lightning.fabric.strategies import Strategy
    from lightning.pytorch import Callback, LightningDataModule
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.plugins import LayerSync
    from lightning.pytorch.profilers import Profiler
    from lightning.pytorch.strategies import Strategy as TrainerStrategy
    from torch.distributed import fsdp

    bases: tuple[type, ...] = (Accelerator, CheckpointIO, ClusterEnvironment, Precision, LayerSync, Profiler)
    bases += (Strategy, TrainerStrategy)
    bases += (Callback, LightningDataModule, Logger, torch.nn.Module, torch.optim.Optimizer)
    bases += (fsdp.MixedPrecision, fsdp.CPUOffload, fsdp.MixedPrecisionPolicy, fsdp.OffloadPolicy)
    if isinstance(found, torch.dtype):
        return True
    if not inspect.isclass(found) or found.__module__.partition(".")[0] not in PACKAGES:
        return False
    return found.__module__.startswith("lm_lightning.") or issubclass(found, bases)


def refuse(name: str) -> ImportError:
    """The error for an import path that is not allowed; jsonargparse may catch it, so `check` raises another one."""
    state.refused = state.refused or name
    return ImportError(f"{name} is not trusted")


def guarded(import_object: Callable) -> Callable:
    """Adds the restrictions to jsonargparse's function that imports the class that a value names."""

    @functools.wraps(import_object)
    def wrapped(name: Any, *args: Any, **kwargs: Any) -> Any:
        is_path = isinstance(name, str) and PATH.fullmatch(name)
        if not is_path or name == "jsonargparse.ArgumentParser":  # (which jsonargparse itself imports)
            return import_object(name, *args, **kwargs)
        if state.config is None:
            state.named.add(name)
            return import_object(name, *args, **kwargs)
        if trusted(name):
            return import_object(name, *args, **kwargs)
        if not known(name):
            raise refuse(name)
        found = import_object(name, *args, **kwargs)
        if not harmless(found):
            raise refuse(name)
        return found

    return wrapped


def locate(name: str) -> Any:
    """The class or function with an import path; None if it does not exist.

    Raises:
        UserError: If its import is not allowed.
    """
    if state.config is not None and PATH.fullmatch(name) and not trusted(name):
        found = pydoc.locate(name) if known(name) else None
        if not known(name) or not (found is None or harmless(found)):
            refuse(name)
            check()
        return found
    return pydoc.locate(name)


def recorded_class(path: Any, base: type[T], what: str) -> type[T]:
    """The class that a checkpoint names; it must belong to this project or to a package that the user trusts.

    Args:
        path: Its import path, of any type.
        base: The class from which it must be derived.
        what: What such a class is called in messages.

    Raises:
        UserError: If it is not such a class; names the option that trusts its package.
    """
    name = path if isinstance(path, str) and PATH.fullmatch(path) and "__" not in path else ""
    if not (f"{name}.".startswith("lm_lightning.") or (name and trusted(name))):
        raise UserError(
            f"the checkpoint names the {what} {printable(str(path))[:200]}, which is not one of lm_lightning: if you "
            f"trust it, add --trust_package {printable(name.partition('.')[0]) or 'NAME'} to the command"
        )
    try:
        found = pydoc.locate(name)
    except pydoc.ErrorDuringImport as error:
        raise UserError(f"the checkpoint's {what} {name} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(
            f"the checkpoint's {what} {name} does not exist: the checkpoint is damaged, or from another version"
        )
    return found


def recorded_instance(record: Any, base: type[T], what: str, live: Mapping[str, type[T]] = {}) -> T:
    """Creates an object from its `class` and `options` in a checkpoint.

    Args:
        record: A dict of both, of any type.
        base: The class from which its class must be derived.
        what: What such a class is called in messages.
        live: Classes that may be used in any case, as this process has imported them already, by their import paths.

    Raises:
        UserError: If its class is not allowed, see `recorded_class`, or does not accept these options.
    """
    options = record.get("options") if isinstance(record, dict) else None
    if not isinstance(options, dict):
        raise UserError(f"the checkpoint's {what} is recorded without its class and options: the checkpoint is damaged")
    path = record.get("class")
    found = live.get(str(path)) or recorded_class(path, base, what)
    try:
        return found(**options)
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{name} {value!r}" for name, value in options.items())
        raise UserError(
            f"the checkpoint's {what} {found.__module__}.{found.__qualname__} does not accept its options {given:.300} "
            f"({error}): use the version of this class that wrote the checkpoint"
        ) from error


guard_imports(guarded)
