"""The registry: which tasks and optional features this project has, and what each adds to the core.

The core imports none of them. A package in `FEATURES` has `FEATURE = Feature(...)` in its `__init__.py`, which imports
nothing else, so that reading all of them takes no time. To remove one, delete its folder, its tests and its configs,
and its line here. To add one, add a folder and a line.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lm_lightning.errors import UserError

# Packages in this one, a line each
FEATURES = (
    "generation",
    "baselines",
    "tasks.instruction",
    "tasks.masked_lm",
    "tasks.classification",
    "tasks.tagging",
    "tasks.parsing",
    "tasks.questions",
    "tasks.embedding",
    "tasks.seq2seq",
    "tasks.preference",
    "lora",
    "compression",
    "cuda",
    "diagnostics",
    "tuning",
    "reports",
    "tracking",
    "sharding",
    "xla",
    "profiling",
    "filters",
)

# Modules of the core whose classes can be chosen by their short names
CORE = (
    "lm_lightning.callbacks.dropout",
    "lm_lightning.checkpoints.plugins",
    "lm_lightning.data.pretraining",
    "lm_lightning.models.gpt",
)


@dataclass(frozen=True)
class Feature:
    """What a task or an optional feature adds to the core. Values are import paths, which are imported when needed.

    Args:
        commands: Commands of `python -m lm_lightning`. Maps the name of each to a module with a `main()` that reads
            `sys.argv`, and a summary for the help.
        classes: Modules that are imported before options are parsed. Their classes (of models, data modules, callbacks,
            loggers, ...) can be chosen by their short names as `class_path`; they may also register names, for example
            with `lm_lightning.strategies.register`.
        data_classes: The same for classes that only the options of the data name, such as filters. `prepare` imports
            these modules, but not those of `classes`, so they must not import torch.
        callbacks: Classes of callbacks that are added to every run, created without arguments, unless its options have
            one of that class.
        trainer_settings: Functions that are called with the trainer's settings (a namespace, which they may change)
            before the trainer is made. They raise `UserError` to refuse settings.
        checkpoint_folders: Modules that read checkpoints which are folders, not files: see `CheckpointFormat` in
            `checkpoints/loading.py`.
        networks: Classes of networks of this project, by their names, as checkpoints and exports name them. Each has a
            method `register`, which registers its type with the auto classes of `transformers`.
    """

    commands: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    data_classes: tuple[str, ...] = ()
    callbacks: tuple[str, ...] = ()
    trainer_settings: tuple[str, ...] = ()
    checkpoint_folders: tuple[str, ...] = ()
    networks: Mapping[str, str] = field(default_factory=dict)


@functools.cache
def features() -> dict[str, Feature]:
    """The features by the names of their packages, in the order of `FEATURES`.

    Raises:
        UserError: If a package is missing.
    """
    found = {}
    for name in FEATURES:
        path = f"lm_lightning.{name}"
        try:
            found[name] = importlib.import_module(path).FEATURE
        except ModuleNotFoundError as error:
            if error.name is None or not f"{path}.".startswith(f"{error.name}."):
                raise
            raise UserError(
                f"there is no package {path}, which FEATURES in lm_lightning/features.py lists: remove its line there, "
                "or restore its folder"
            ) from error
        except AttributeError as error:
            raise UserError(f"{path} has no FEATURE in its __init__.py: see lm_lightning/features.py") from error
    return found


def commands() -> dict[str, tuple[str, str]]:
    """The commands of all features: module and summary by name."""
    return {name: command for feature in features().values() for name, command in feature.commands.items()}


def import_classes() -> None:
    """Imports the modules whose classes can be chosen by their short names, and those of the callbacks."""
    for module in CORE:
        importlib.import_module(module)
    import_data_classes()
    for feature in features().values():
        for module in (*feature.classes, *(path.rpartition(".")[0] for path in feature.callbacks)):
            importlib.import_module(module)


def import_data_classes() -> None:
    """Imports the modules of classes that only the options of the data name."""
    for feature in features().values():
        for module in feature.data_classes:
            importlib.import_module(module)


def callbacks(given: Iterable[Any] = ()) -> list[Any]:
    """New instances of the callbacks that the features add to every run, unless `given` has one of their class."""
    classes = [resolve(path) for feature in features().values() for path in feature.callbacks]
    return [own() for own in classes if not any(isinstance(callback, own) for callback in given)]


def trainer_settings() -> Iterator[Callable[[Any], None]]:
    """The functions that check and complete the trainer's settings."""
    for feature in features().values():
        yield from map(resolve, feature.trainer_settings)


def checkpoint_folders() -> list[Any]:
    """The modules that read checkpoints which are folders."""
    return [importlib.import_module(path) for feature in features().values() for path in feature.checkpoint_folders]


def networks() -> dict[str, str]:
    """The import paths of this project's own networks by the names of their classes."""
    return {name: path for feature in features().values() for name, path in feature.networks.items()}


@functools.cache
def register_networks() -> None:
    """Makes `transformers` load this project's own networks, as it loads its own. (This imports `transformers`.)"""
    for path in networks().values():
        resolve(path).register()


def resolve(path: str) -> Any:
    """The class or function that an import path names."""
    return pkgutil.resolve_name(path)
