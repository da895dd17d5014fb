"""jsonargparse: parsers for the options of classes, and the import of classes."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Optional

import typeshed_client
from jsonargparse import ArgumentParser, _actions, _core, _stubs_resolver, _subcommands, _typehints

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


def find_options_by_name() -> None:
    """Makes jsonargparse look up options by their names, which takes an eighth off the time of a short `fit`.

    It would go through all options of a parser for each value of a config, several times. Alternative: none.
    """
    for module in (_core, _subcommands):
        module.find_action_and_subcommand = find_action_and_subcommand  # type: ignore[attr-defined]


def find_action_and_subcommand(parser: Any, dest: str, exclude: Any = None) -> tuple[Any, Optional[str]]:
    """What the function of jsonargparse returns: an option, and the subcommand to which it belongs.

    Args:
        parser: The parser.
        dest: Name of the option, or of a subcommand, or of an option of a subcommand.
        exclude: Types of options that are not searched.
    """
    known, subcommands, options = parser.__dict__.get("_options_by_name", ((), (), {}))
    if known != parser._actions:
        known = list(parser._actions)
        actions = [action for action in known if not isinstance(action, _actions.non_parsing_actions)]
        subcommands = [action for action in actions if isinstance(action, _subcommands.ActionSubCommands)]
        options = {}
        for action in actions:
            for name in {action.dest, *(flag[2:] for flag in action.option_strings if flag.startswith("--"))}:
                options.setdefault(name, []).append(action)
        parser.__dict__["_options_by_name"] = known, subcommands, options
    for action in subcommands:
        if exclude is not None and isinstance(action, exclude):
            continue
        if dest in action._name_parser_map:
            return action, None
        name, _, rest = dest.partition(".")
        if name in action._name_parser_map:
            found, inner = find_action_and_subcommand(action._name_parser_map[name], rest, exclude)
            return found, name if inner is None else f"{name}.{inner}"
    last = None
    for action in options.get(dest, ()):
        if exclude is None or not isinstance(action, exclude):
            if not isinstance(action, (_actions._ActionConfigLoad, _actions.ActionFail)):
                return action, None
            last = action
    return last, None
