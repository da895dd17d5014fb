"""Config files: YAML in, one tree of options out, in which later files change earlier ones key by key."""

import argparse
import difflib
import re
import sys
from pathlib import Path
from typing import Any, NoReturn, Optional

import yaml
from jsonargparse import ArgumentParser, _typehints, set_dumper, set_loader

from lm_lightning.cli.explain import flags_of
from lm_lightning.console import printable
from lm_lightning.errors import UserError, first_process
from lm_lightning.security.redaction import remember

SECTIONS = ("model", "data", "trainer", "best", "last")
KINDS = ("class_path", "model_type")  # what else a mapping has belongs to the value of these
SPEC = {"class_path", "init_args", "dict_kwargs"}
LARGEST = 10_000_000  # characters of a file, its aliases written out, where each value counts 10 more
DEEPEST = 100  # levels


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML 1.2: keys are text, as they are written, and only true and false are booleans.

    YAML 1.1 reads `yes`, `no`, `on` and `off` as booleans, `12:30` as a number of base 60, `010` as 8, `2026-01-31` as
    a date and `1e-3` as text.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep=deep)


Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (  # the first characters say which patterns are tried
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", "[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|\.[0-9]+([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("merge", "<<", "<"),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def load(text: str) -> Any:
    """The value that a YAML text says.

    Raises:
        yaml.YAMLError: If it is no YAML, has a key twice, is nested too deeply, or expands to much more than it is.
    """
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        refuse_expanding(node)
        refuse_duplicates(node)
        return loader.construct_document(node)
    except ValueError as error:  # such as a number of thousands of digits
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


set_loader("yaml", load, (yaml.YAMLError,))  # of the values of flags, too


class Dumper(yaml.SafeDumper):
    """Puts text in quotes that this loader or one of YAML 1.1 would read as something else."""


for _letter, _patterns in Loader.yaml_implicit_resolvers.items():
    for _tag, _pattern in _patterns:
        Dumper.add_implicit_resolver(_tag, _pattern, [_letter])


def dump(value: Any) -> str:
    """A value as YAML."""
    return yaml.dump(value, Dumper=Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)


set_dumper("yaml", dump)


class Parser(ArgumentParser):
    """Parser of a command: options are not abbreviated, and a refusal knows which there are."""

    def __init__(self, *args: Any, allow_abbrev: bool = False, exit_on_error: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=allow_abbrev, exit_on_error=exit_on_error, **kwargs)

    def error(self, message: str, ex: Any = None) -> NoReturn:  # noqa: D102
        try:
            super().error(message, ex)
        except argparse.ArgumentError as error:
            error.names = flags_of(self)  # type: ignore[attr-defined]
            raise


def refuse_expanding(root: yaml.Node) -> None:
    """Refuses aliases that refer to what they are in, or that together say much more than the text, and deep nesting.

    A few lines can otherwise be a list of billions, or one without an end.
    """
    # Of each node its size, written out, and its depth; None while its parts are counted.
    known: dict[int, Optional[tuple[int, int]]] = {}
    waiting = [(root, False)]
    while waiting:
        node, counted = waiting.pop()
        parts = [] if isinstance(node, yaml.ScalarNode) else node.value
        parts = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
        if counted:
            of_parts = [known[id(part)] or (1, 1) for part in parts]
            length = len(node.value) if isinstance(node, yaml.ScalarNode) else 0
            size = 10 + length + sum(size for size, _ in of_parts)
            depth = 1 + max([0, *(depth for _, depth in of_parts)])
            if depth > DEEPEST:
                problem = f"it is nested more than {DEEPEST} levels deep"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
            if size > LARGEST:
                problem = f"with its aliases (*) written out, it has more than {LARGEST:,} characters"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
            known[id(node)] = size, depth
        elif id(node) not in known:
            known[id(node)] = None
            waiting.append((node, True))
            waiting += [(part, False) for part in parts]
        elif known[id(node)] is None:
            problem = "an alias (*) refers to the value that it is in"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def refuse_duplicates(node: yaml.Node) -> None:
    """Refuses a mapping that has a key twice, of which YAML would keep the last."""
    waiting, done = [node], set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) in done or isinstance(node, yaml.ScalarNode):  # (an alias is the same node again)
            continue
        done.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
            continue
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be text", problem_mark=key.start_mark)
            if key.value in seen and key.value != "<<":
                problem = f"the key {key.value!r} is given twice, in line {seen[key.value]} and in line {line}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen[key.value] = line
            waiting.append(value)


def keep_own_settings(parser_or_action: Any, before: Any, value: Any) -> None:
    """Drops the settings of another class, as a class that is chosen has its own defaults.

    jsonargparse would keep those that the new class accepts, even if they are defaults of the old one.
    """
    before = _typehints.subclass_spec_as_namespace(before)
    if before and before.get("init_args") and before["class_path"] != value["class_path"]:
        before.pop("init_args")


_typehints.discard_init_args_on_class_path_change = keep_own_settings


def read(file: str) -> dict[str, Any]:
    """The options in a config file; a section may be the name of a file of its own, relative to it.

    Raises:
        UserError: Names the file, and the line if there is one.
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
            + (f": did you mean {path.parent / close[0]}?" if close else f"; there are {names(near)}" if near else "")
        )
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"the config {file} has more than {LARGEST:,} bytes: is it a config?")
        content = load(path.read_text(encoding="utf-8-sig"))
        remember(content)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the config {file} cannot be read: it is no text in UTF-8 ({error})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{file}{yaml_problem(error)}") from error
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
    """Names of files for a message, not too many."""
    return ", ".join(map(str, files[:8])) + (", ..." if len(files) > 8 else "")


def yaml_problem(error: yaml.YAMLError) -> str:
    """Where and why a text is no YAML, in words."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
    advice = {
        "cannot start any token": "a value or key begins with a character that YAML reserves, or a line with a tab: "
        "indent with spaces, and put such values in quotes",
        "mapping values are not allowed": "there is a second colon in a line, or a line is indented wrongly: "
        "put values with a colon in quotes",
        "could not find expected": "a colon is missing after a key, or a quote or bracket is not closed",
        "undefined alias": "a value that begins with * must be in quotes",
        "while parsing": "a bracket or quote is not closed, or a line is indented wrongly",
        "did not find expected": "a bracket or quote is not closed, or a line is indented wrongly",
        "unacceptable character": "there is a control character in it: is it a text file?",
        "control characters": "there is a control character in it: is it a text file?",
    }
    words = next((words for part, words in advice.items() if part in str(error)), problem)
    return (f", line {mark.line + 1}" if mark else "") + f": {words}"


def merge(options: dict[str, Any], later: dict[str, Any], file: str, where: str = "") -> None:
    """Changes options by those of a later file, key by key.

    A mapping of another class or model type takes the place of the earlier one, whose settings are not its own. What
    ends with `+` is appended to a list.

    Args:
        options: Are changed.
        later: The later ones.
        file: Where they are from, for messages.
        where: Where they stand, such as `model`.
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
    """Whether two names are of different classes, as far as they say it."""
    return None not in (before, later) and str(before).rpartition(".")[2] != str(later).rpartition(".")[2]


def report(name: str, change: str, before: dict[str, Any], later: Any) -> None:
    """Tells of settings that a change has dropped."""
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


def report_replaced(options: Any, config: Any, name: str = "") -> None:
    """Tells of settings in config files that flags have dropped, with the class that they belong to or as a whole.

    Args:
        options: Those in the config files.
        config: What they and the flags have become.
        name: Where they stand.
    """
    for key, value in options.items():
        final, own = config.get(key, value), f"{name}.{key}".lstrip(".")
        if not isinstance(value, dict) or not hasattr(final, "keys"):
            continue
        if other(value.get("class_path"), final.get("class_path")):
            report(own, f"a flag has chosen {final['class_path']} instead of {value['class_path']}", value, {})
        else:
            if isinstance(final, dict) and not value.keys() <= final.keys():
                report(own, "a flag has replaced the whole", value, final)
            report_replaced(value, final, own)


def layered(arguments: list[str]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Reads the config files of a command line; flags win, wherever they stand.

    Args:
        arguments: Of a command.

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


def as_argument(options: dict[str, Any]) -> list[str]:
    """Options as an argument of a command, with types that no parser can take for others."""
    return (
        ["--config", yaml.safe_dump(options, default_style='"', allow_unicode=True, sort_keys=False)] if options else []
    )
