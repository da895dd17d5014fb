"""Saves configs, and checks that the YAML gives the same configuration when it is read again."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lm_lightning import yaml_text
from lm_lightning.compat.jsonargparse import UNSAVEABLE
from lm_lightning.errors import UserError, one_line
from lm_lightning.files import write_text
from lm_lightning.security.redaction import redact


def checked(parser: LightningArgumentParser, config: Any) -> Any:
    """Returns a config that is the same after it is saved and parsed again.

    Values that YAML cannot represent, such as functions, objects and open files, are omitted if they are defaults of a
    class, as they are then set again when the config is parsed.

    Args:
        parser: The parser of the config.
        config: The config; not changed.

    Raises:
        UserError: If there are other such values; names the option.
    """
    saved = config.clone()
    text = dumped(parser, saved)
    lost = [name for name, value in leaves(yaml_text.load(text)) if str(value).startswith(UNSAVEABLE)]
    for name in lost:
        remove(saved, name)
    try:
        again = parser.parse_string(dumped(parser, saved) if lost else text)
        if changed := different(config, again):
            for name in changed:
                remove(saved, name)
            again = parser.parse_string(dumped(parser, saved))
    except Exception as error:  # of any class that checks its own options
        raise refusal(lost, f"cannot be read again: {one_line(error, 200)}") from error
    if changed := different(config, again):
        raise refusal(changed, "would have another value when it is read again")
    return saved


def write(parser: LightningArgumentParser, config: Any, file: Path) -> None:
    """Writes a config as YAML, without its secrets."""
    text = dumped(parser, config)
    content = yaml_text.load(text)
    redacted = redact(content)
    if redacted != content:
        head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
        text = head + yaml_text.dump(redacted)
    write_text(file, text)


def refusal(names: list[tuple], reason: str) -> UserError:
    """The error for options that cannot be saved."""
    options = ", ".join(".".join(map(str, name)) for name in names) or "an option"
    return UserError(
        f"{options} cannot be saved in config.yaml, so the run could not be repeated ({reason}): use a number, text, "
        "list or dict, a class by `class_path`, or a function by its import path"
    )


def dumped(parser: LightningArgumentParser, config: Any) -> str:
    """The config as YAML, as it is saved; it was validated when it was parsed."""
    with warnings.catch_warnings():  # about values that are checked here
        warnings.simplefilter("ignore")
        return parser.dump(config, skip_unset=False, skip_validation=True)


def leaves(value: Any, name: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """The names and values of all options; items of lists have numbers as their names."""
    if isinstance(value, (dict, Namespace)):
        children: Any = as_dict(value).items()
    elif isinstance(value, list):
        children = enumerate(value)
    else:
        yield name, value
        return
    for key, item in children:
        yield from leaves(item, (*name, key))


def as_dict(value: Any) -> dict:
    """The options of a namespace or dict; nested options are not converted."""
    return value if isinstance(value, dict) else vars(value)


def different(config: Any, again: Any) -> list[tuple]:
    """The names of options that are not the same in `again`."""
    found = dict(leaves(again))
    return [name for name, value in leaves(config) if name[0] != "config" and not same(value, found.get(name, found))]


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal, both NaN, or copies of the same object."""
    try:
        if type(one) is type(other) and not callable(one) and hasattr(one, "__dict__") and vars(one) == vars(other):
            return True
        return one is other or bool(one == other) or bool(one != one and other != other)
    except Exception:  # of any class
        return False


def remove(config: Any, name: tuple) -> None:
    """Removes the class option that contains a value, if there is one."""
    holder = config
    for position, part in enumerate(name):
        here: Any = holder if isinstance(holder, list) else as_dict(holder)
        if position and name[position - 1] == "init_args":
            here.pop(part, None)
            return
        holder = here[part]
