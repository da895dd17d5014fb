"""Reads config files and merges them key by key, so that later files override earlier ones."""

import argparse
import difflib
import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, set_dumper, set_loader

from lm_lightning.cli.explain import flags_of
from lm_lightning.compat.jsonargparse import find_options_by_name, find_stubs_in_process, install_class_settings
from lm_lightning.console import printable
from lm_lightning.errors import UserError, first_process
from lm_lightning.security.redaction import remember
from lm_lightning.yaml_text import LARGEST, dump, explain_error, load

SECTIONS = ("model", "data", "trainer", "best", "last")
KINDS = ("class_path", "model_type")  # keys whose value decides which other keys a mapping may have
SPEC = {"class_path", "init_args", "dict_kwargs"}

set_loader("yaml", load, (yaml.YAMLError,))  # for the values of flags, too
install_class_settings()
find_stubs_in_process()
find_options_by_name()
set_dumper("yaml", dump)


class Parser(ArgumentParser):
    """Parser of a command: options cannot be abbreviated, and its errors have the names of the existing options."""

    def __init__(self, *args: Any, allow_abbrev: bool = False, exit_on_error: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=allow_abbrev, exit_on_error=exit_on_error, **kwargs)

    def error(self, message: str, ex: Any = None) -> NoReturn:  # noqa: D102
        try:
            super().error(message, ex)
        except argparse.ArgumentError as error:
            error.names = flags_of(self)  # type: ignore[attr-defined]
            raise


def read(file: str) -> dict[str, Any]:
    """Reads the options of a config file. The value of a section may be the name of another file, relative to this one.

    Raises:
        UserError: If the file cannot be read; names the file, and the line if possible.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        if path.is_dir():
            found = sorted(path.glob("*.y*ml"))
            raise UserError(
                f"--config {file} is a folder, but must be a file" + (f", such as {found[0]}" if found else "")
            )
        near = sorted(path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, [other.name for other in near], n=1)
        raise UserError(
            f"there is no config file {file}"
            + (f": did you mean {path.parent / close[0]}?" if close else f"; available: {names(near)}" if near else "")
        )
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"the config {file} has more than {LARGEST:,} bytes: is it a config file?")
        content = load(path.read_text(encoding="utf-8-sig"))
        remember(content)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the config {file} cannot be read as UTF-8 text ({error})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{file}{explain_error(error)}") from error
    if content is None:
        raise UserError(f"the config {file} is empty")
    if not isinstance(content, dict):
        raise UserError(f"the config {file} has no options by name, such as `trainer: {{max_steps: 100}}`")
    options: dict[str, Any] = {}
    for name, value in content.items():
        if name in SECTIONS and isinstance(value, str):
            section = path.parent / value
            value = read(str(section)) if section.suffix and section.is_file() else value
            if name in ("model", "data") and isinstance(value, str):
                value = {"class_path": value}
        *sections, name = name.split(".")  # `trainer.max_steps: 3` is possible, too
        for section in reversed(sections):
            name, value = section, {name: value}
        merge(options, {name: value}, file)
    return options


def names(files: list[Path]) -> str:
    """The names of the first few files, for a message."""
    return ", ".join(map(str, files[:8])) + (", ..." if len(files) > 8 else "")


def merge(options: dict[str, Any], later: dict[str, Any], file: str, where: str = "") -> None:
    """Overrides options by those of a later file, key by key.

    A mapping with another class or model type replaces the earlier mapping completely, whose settings belong to the
    earlier class. The value of a key that ends with `+` is appended to a list.

    Args:
        options: The earlier options; changed in place.
        later: The later options.
        file: The file that contains `later`, for messages.
        where: The section that contains the options, such as `model`.
    """
    for key, value in later.items():
        name = f"{where}.{key}" if where else key
        if key.endswith("+"):
            items = value if isinstance(value, list) else [value]
            own = key.removesuffix("+") if key.removesuffix("+") in options else key
            before = options.get(own)
            options[own] = [*(before if isinstance(before, list) else [] if before is None else [before]), *items]
            continue
        options.pop(f"{key}+", None)
        before = options.get(key)
        if isinstance(before, str) and isinstance(value, dict) and "init_args" in value:
            before = {"class_path": before}
        if isinstance(before, dict) and "class_path" in before:
            if isinstance(value, str):
                value = {"class_path": value}
            elif isinstance(value, dict) and not SPEC & value.keys():
                value = {"init_args": value}
        if not isinstance(before, dict) or not isinstance(value, dict):
            options[key] = value
        elif kind := next((kind for kind in KINDS if other(before.get(kind), value.get(kind))), None):
            options[key] = value
            report(name, f"{kind} {value[kind]} in {file} replaces {before[kind]}", before, value)
        else:
            options[key] = dict(before)
            merge(options[key], value, file, name)


def other(before: Any, later: Any) -> bool:
    """Whether two values name different classes; False if one of them names none."""
    return None not in (before, later) and str(before).rpartition(".")[2] != str(later).rpartition(".")[2]


def report(name: str, change: str, before: dict[str, Any], later: Any) -> None:
    """Prints which settings a change has dropped."""
    own, new = settings_of(before), settings_of(later)
    dropped = [key for key in own if key not in new and key not in KINDS]
    if dropped and first_process():
        print(
            f"{name.replace('.init_args', '')}: {change}, so these no longer apply: {printable(', '.join(dropped))}",
            file=sys.stderr,
        )


def settings_of(value: Any) -> dict[str, Any]:
    """The settings of a class, or the keys of another mapping."""
    if not hasattr(value, "keys"):
        return {}
    return (value.get("init_args") or {}) if "class_path" in value else value


def print_replaced(options: Any, config: Any, name: str = "") -> None:
    """Prints which settings of config files were dropped because a flag replaced their class or their mapping.

    Args:
        options: The options in the config files.
        config: The final options, of config files and flags.
        name: The section that contains them.
    """
    for key, value in options.items():
        final, own = config.get(key, value), f"{name}.{key}".lstrip(".")
        if not isinstance(value, dict) or not hasattr(final, "keys"):
            continue
        if other(value.get("class_path"), final.get("class_path")):
            report(own, f"a flag has chosen {final['class_path']} instead of {value['class_path']}", value, {})
        else:
            if isinstance(final, dict) and not value.keys() <= final.keys():
                report(own, "a flag has replaced all of it", value, final)
            print_replaced(value, final, own)


def read_layered(arguments: list[str]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Reads the config files of a command line. Flags override them, whether they come before or after.

    Args:
        arguments: The arguments of a command.

    Returns:
        The options of all files, the names of the files, and the other arguments.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-c", "--config", action="append", default=[], metavar="FILE")
    given, rest = parser.parse_known_args(arguments)
    options: dict[str, Any] = {}
    for file in given.config:
        merge(options, read(file), file)
    return options, given.config, rest


def to_argument(options: dict[str, Any]) -> list[str]:
    """Converts options to an argument of a command, quoted so that every parser reads the same types."""
    return (
        ["--config", yaml.safe_dump(options, default_style='"', allow_unicode=True, sort_keys=False)] if options else []
    )
