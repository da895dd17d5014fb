"""jsonargparse: parsers for the options of classes, and the import of classes."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Optional

import typeshed_client
from jsonargparse import ArgumentParser, _actions, _stubs_resolver, _typehints

UNSAVEABLE = "Unable to serialize instance"
"""The beginning of the text that `dump` writes for a value that YAML cannot represent.

Alternative: none, such values do not raise an error.
"""


def option_names(parser: ArgumentParser) -> list[str]:
    """All flags of a parser, with their dashes.

    Alternative: `get_defaults().keys()`, which has neither `--config` nor the `--x.help` and `--x+` of classes.
    """
    return list(parser._option_string_actions)


def set_help(parser: ArgumentParser, help_of: Mapping[str, str], title_of: Optional[Mapping[str, str]] = None) -> None:
    """Replaces the help of options that were added for a class, by their names, and the titles of their groups.

    Alternative: adding each option individually, without its class.
    """
    for name, group in (parser.groups or {}).items():
        group.title = (title_of or {}).get(name, group.title)
    for action in parser._actions:
        action.help = help_of.get(action.dest, action.help)


def parses_class_options(parser: ArgumentParser) -> bool:
    """Whether jsonargparse created a parser for the options of a class.

    Alternative: none, all parsers are instances of the same class.
    """
    return getattr(parser, "_inner_parser", False)


def keep_own_settings(parser_or_action: Any, before: Any, value: Any) -> None:
    """Removes the settings of a class when another class, with its own defaults, is chosen.

    jsonargparse would keep those that the new class accepts, even if they are defaults of the old class. Alternative:
    none, there is no setting for this.
    """
    before = _typehints.subclass_spec_as_namespace(before)
    if before and before.get("init_args") and before["class_path"] != value["class_path"]:
        before.pop("init_args")


def install_class_settings() -> None:
    """Makes jsonargparse use `keep_own_settings`."""
    _typehints.discard_init_args_on_class_path_change = keep_own_settings


def guard_imports(guarded: Callable[[Callable], Callable]) -> None:
    """Wraps the function that imports the class that a value names.

    Alternative: `import_path_allowlist` of `set_parsing_settings` (4.53), which checks names but not the classes to
    which they refer, and which is the same list for trusted and untrusted configs.
    """
    for module in (_actions, _typehints):
        module.import_object = guarded(module.import_object)  # type: ignore[attr-defined]


def find_stubs_in_process() -> None:
    """Makes jsonargparse look for stub files, which have the types of options, in this process's `sys.path`.

    It would start another Python to print its path, which a Ctrl-C could end with a traceback. Alternative: none, the
    path cannot be set.
    """
    path = [Path(folder) for folder in sys.path if folder]
    context = typeshed_client.get_search_context(search_path=path, allow_py_files=False)
    _stubs_resolver.stubs_resolver = _stubs_resolver.StubsResolver(search_context=context)  # type: ignore[assignment]
