"""Converts jsonargparse's messages about a command line or a config to one sentence in plain words."""

import difflib
import inspect
import pydoc
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional

import yaml

from lm_lightning.compat import jsonargparse_messages as messages
from lm_lightning.errors import UserError
from lm_lightning.yaml_text import Loader

# A package that a class named by an option may need
MISSING = re.compile(r"(?:No module named '|import of )(bitsandbytes)\b")

BASES = {  # base classes of the classes that an option may name
    "model": "lm_lightning.models.module.LanguageModule",
    "adapter": "lm_lightning.models.adapter.Adapter",
    "data": "lightning.pytorch.LightningDataModule",
    "callbacks": "lightning.pytorch.Callback",
    "filters": "lm_lightning.data.filter.Filter",
    "logger": "lightning.pytorch.loggers.Logger",
    "optimizer": "torch.optim.Optimizer",
    "profiler": "lightning.pytorch.profilers.Profiler",
}
# Names that other libraries use for our options
SYNONYMS = {
    "lr": "model.optimizer.lr",
    "learning_rate": "model.optimizer.lr",
    "weight_decay": "model.optimizer.weight_decay",
    "num_train_epochs": "trainer.max_epochs",
    "epochs": "trainer.max_epochs",
    "gpus": "trainer.devices",
    "output_dir": "runs_dir",
    "model_name_or_path": "model.pretrained",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "seed": "seed_everything",
    "resume": "ckpt_path",
}
EVALUATIONS = ("validate", "test", "predict")  # commands that evaluate a run
TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}
TYPES |= dict.fromkeys(("list", "Sequence", "Iterable", "set", "frozenset"), "a list")
TYPES |= {"dict": "options by name, such as {name: value}", "timedelta": "a time, such as 00:12:00:00"}


def program(command: str = "") -> str:
    """How this program was started, for help and messages."""
    script = Path(sys.argv[0]).stem if sys.argv else ""
    return f"{'lm-lightning' if script.startswith('lm-lightning') else 'python -m lm_lightning'} {command}".strip()


def command_line_error(error: Exception, arguments: list[str], names: Iterable[str] = ()) -> UserError:
    """The sentence for a command line or a YAML file that the parser refused.

    Args:
        error: The parser's error, whose message has many lines.
        arguments: The command and its arguments.
        names: Names of the existing options, to suggest one for a misspelled name.
    """
    text, names = str(error), list(names) or list(getattr(error, "names", ()))
    if missing := MISSING.search(text):
        return UserError(f"an option names a class of {missing[1]}, which is missing: pip install {missing[1]}")
    if match := messages.UNKNOWN.search(text):
        return UserError(unknown_option(text, match, arguments, names))
    values = [match for match in messages.EXPECTED.finditer(text) if "NoneType" not in match["type"]]
    match = messages.CLASS.search(text)
    if match and (option_of(text, match.start()).rpartition(".")[2] in BASES or not values):
        return UserError(wrong_class(text, match, arguments))
    if match := messages.REQUIRED.search(text):
        return UserError(required(text, match, arguments))
    if match := messages.CONFIG.search(text):
        option = option_of(text, match.start())
        return UserError(
            f"{place(option, arguments)} is {shown(match[1])}, but must have options by name, such as {{name: value}}"
        )
    if match := messages.EXPECTED.search(text):
        return UserError(wrong_value(text, match, arguments))
    if "expected one argument" in text or "expected at least one argument" in text:
        return UserError(f"{flag_without_value(text, arguments)} has no value")
    text = " ".join(messages.KEY.sub(r"\1", text).split())
    return UserError(f"{text[:500]}; `{program(arguments[0])} --help` explains the options")


def instantiation_error(error: Exception) -> UserError:
    """The error for a class that could not be instantiated with the values of its options.

    If an option accepts several types, jsonargparse lists why each of them does not fit; one of the reasons is the
    error of the class itself.

    Args:
        error: The error of the parser or of the class.
    """
    text = str(error)
    if tried := messages.tried_types(text):
        text = " ".join(tried)
    return UserError(" ".join(text.split())[:500])


def flag_without_value(text: str, arguments: list[str]) -> str:
    """The flag that has no value; jsonargparse names only its section."""
    section = (messages.ARGUMENT.findall(text) or ["--"])[0]
    for flag, after in zip(arguments, [*arguments[1:], "--"]):
        if flag.startswith(section) and "=" not in flag and re.match(r"--?[a-zA-Z]|--$", after):
            return flag
    return section


def option_of(text: str, end: int) -> str:
    """The option that the text before a position is about."""
    keys: list[str] = []
    for key in messages.KEY.findall(text[:end]):
        if key != "config" and keys[-1:] != [key]:
            keys.append(key)
    return ".".join(keys).replace(".init_args", "")


def place(option: str, arguments: list[str]) -> str:
    """An option with its origin: a flag, or a line of a config file."""
    parts = option.split(".")
    for argument in arguments:
        flag = argument.partition("=")[0].lstrip("-").replace(".init_args", "").removesuffix("+")
        if argument.startswith("--") and (
            option == flag or option.startswith(f"{flag}.") or flag.startswith(f"{option}.")
        ):
            return f"--{option}"
    for file in reversed(config_files(arguments)):
        if line := line_of(file, parts):
            return f"{file}, line {line}: {option}"
    return option


def config_files(arguments: list[str]) -> list[str]:
    """The config files of a command line."""
    pairs = zip(arguments, [*arguments[1:], ""])
    given = [
        after if flag in ("-c", "--config") else flag.partition("=")[2]
        for flag, after in pairs
        if re.match(r"-c$|--config(=|$)", flag)
    ]
    return [file for file in given if Path(file).is_file()]


def line_of(file: str, option: list[str]) -> Optional[int]:
    """The line of a config file that sets an option; None if there is none."""

    def find(node: yaml.Node, parts: list[str], line: Optional[int]) -> Optional[int]:
        if not parts:
            return line
        if isinstance(node, yaml.SequenceNode):
            return next(filter(None, (find(item, parts, None) for item in node.value)), None)
        if not isinstance(node, yaml.MappingNode):
            return line  # a class that is given by its name only
        own = {key.value: (key, value) for key, value in node.value}
        found: Any
        for length in range(len(parts), 0, -1):  # `trainer.max_steps` may be one key
            if found := own.get(".".join(parts[:length])):
                return find(found[1], parts[length:], found[0].start_mark.line + 1)
        return find(own["init_args"][1], parts, line) if "init_args" in own else None

    try:
        node = yaml.compose(Path(file).read_text(encoding="utf-8-sig"), Loader=Loader)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return find(node, option, None)


def shown(value: Any) -> str:
    """Quotes and shortens a value for a message."""
    text = str(value)
    return repr(text if len(text) < 60 else f"{text[:60]} ...") if text else "empty"


def join_or(words: list[str]) -> str:
    """Joins words as in `a, b or c`."""
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def given_value(text: str) -> str:
    """The first value that a text of jsonargparse reports."""
    value = (messages.GIVEN.findall(text) or [""])[0].partition(". Got value: ")[0]
    return messages.NESTED.sub(r"\1", value.strip())


def unknown_option(text: str, match: re.Match, arguments: list[str], names: list[str]) -> str:
    """The sentence for an option that does not exist."""
    name = match[1] or match[2] or match[3].split()[0]
    option = option_of(text, match.start())
    if group := messages.GROUP.search(text):
        option = group[1]
    if match[3] and not name.startswith("-"):
        return (
            f"{shown(name)} does not belong to an option: options begin with --, and several values of an option are "
            "a list, '[a, b]'"
        )
    if not option and re.match("-[^-]", name):
        return f"{name} is not an option: `{program(arguments[0])} --help` lists the options"
    name = name.lstrip("-").partition("=")[0]
    if name == "class_path":
        return (
            f"{place(option, arguments)} has options next to class_path: put them under init_args, as "
            "`{class_path: NAME, init_args: {option: value}}`"
        )
    full = f"{option}.{name}" if option else name
    where, section = place(full, arguments), full.partition(".")[0]
    of_value = messages.WITH_CLASS.match(text[match.end() :])
    kinds = [of_value[1]] if of_value else messages.CHOSEN.findall(text[: match.start()])
    kind = kinds[-1].rpartition(".")[2] if kinds else ""
    if kinds:
        names = [*options_of(kinds[-1], option), *names]
    start = f"{where} is not an option" + (f" of {kind}" if kind else "")
    others = classes_with_option(full) if section in ("model", "data") else []
    meant = suggestion(full, names, only_near=bool(others))
    if meant:
        return f"{start}: did you mean {'--' if where.startswith('--') else ''}{meant}?"
    if others:
        return f"{start}, but of {join_or(others)}"
    helps = f"--{option}.help {kind}" if option in ("model", "data") and kind else "--help"
    return f"{start}: `{program(arguments[0])} {helps}` lists the options"


def classes_with_option(option: str) -> list[str]:
    """The classes of models or data modules that have an option."""
    section = option.partition(".")[0]
    base: Any = pydoc.locate(BASES[section])
    return sorted(name for name, kind in own_classes(base).items() if option in options_of(kind, section))


def options_of(kind: Any, prefix: str) -> list[str]:
    """The options of a class, including nested ones.

    Args:
        kind: The class or its import path.
        prefix: The section that contains them, such as `model`.
    """
    from jsonargparse import ArgumentParser

    from lm_lightning.security import imports

    kind = imports.locate(kind) if isinstance(kind, str) else kind
    if not inspect.isclass(kind):
        return []
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, prefix or None, fail_untyped=False)
    return flags_of(parser)


def flags_of(parser: Any) -> list[str]:
    """The options of a parser, without dashes."""
    from lm_lightning.compat.jsonargparse import option_names

    names = [name[2:] for name in option_names(parser) if name.startswith("--")]
    return [name for name in names if name != "help" and not name.endswith((".help", "+"))]


def suggestion(name: str, names: list[str], only_near: bool = False) -> str:
    """The option that a wrong name probably means; empty if no option has a similar name.

    Args:
        name: The wrong name.
        names: The names of the existing options.
        only_near: Whether to search only in the section of the wrong name.
    """
    section, _, last = name.rpartition(".")
    if last in SYNONYMS and (section in ("", "model", "data", "trainer") or SYNONYMS[last].startswith(f"{section}.")):
        return SYNONYMS[last]
    siblings = [other for other in names if other.rpartition(".")[0] == section]
    if close := difflib.get_close_matches(name, siblings, n=1, cutoff=0.8 if section else 0.7):
        return close[0]
    if only_near:
        return ""
    lasts = {other.rpartition(".")[2]: other for other in reversed(names)}
    near = [last] if last in lasts else difflib.get_close_matches(last, lasts, n=1, cutoff=0.8)
    return lasts[near[0]] if near else ""


def subclasses(base: type) -> dict[str, type]:
    """All direct and indirect subclasses of a class, by their names."""
    found: dict[str, type] = {}
    kind: type
    for kind in base.__subclasses__():
        if not kind.__name__.startswith("_"):
            found[kind.__name__] = kind
        found |= {name: own for name, own in subclasses(kind).items() if name not in found}
    return found


def own_classes(base: type) -> dict[str, type]:
    """The subclasses of a class that this project has for users, by their names, without those that are only bases."""
    own = {name: kind for name, kind in subclasses(base).items() if kind.__module__.startswith("lm_lightning.")}
    return {name: kind for name, kind in own.items() if not name.startswith(("Labelled", "Stream", "Corpus"))}


def wrong_class(text: str, match: re.Match, arguments: list[str]) -> str:
    """The sentence for a class that does not exist or cannot be used."""
    option = option_of(text, match.start())
    given = match.groupdict()
    name = next((given[key] for key in ("name", "path", "value", "kind", "other") if given[key]), "")
    name = name or given_value(text[match.start() :])
    last = option.rpartition(".")[2]
    known_base = BASES.get(last)
    base: Any = pydoc.locate(known_base) if known_base else None
    close = difflib.get_close_matches(name.rpartition(".")[2], subclasses(base) if base else (), n=1)
    hint = f"use one of {', '.join(own_classes(base))}" if last in ("model", "data", "filters") else ""
    hint = f"did you mean {close[0]}?" if close else hint
    why = "" if close or not given["why"] else f" ({' '.join(given['why'].split())})"
    if base is None and last not in ("plugins", "strategy", "accelerator"):
        return f"{place(option, arguments)} is {shown(name)}, but must have options by name, such as {{name: value}}"
    what = f"subclass of {base.__name__}" if base else "class"
    return f"{place(option, arguments)} is {shown(name)}, which is not a {what}{why}: " + (
        hint or "give the name of a class, or its import path, such as package.module.Class"
    )


def required(text: str, match: re.Match, arguments: list[str]) -> str:
    """The sentence for required options that are missing."""
    names, option = match[1].split(", "), option_of(text, match.start())
    if option:
        return f"{place(option, arguments)} needs {join_or([f'--{option}.{name}' for name in names])}"
    missing = {name.rpartition(".")[2] for name in names}
    if arguments[0] not in ("fit", *EVALUATIONS) or not missing <= {"model", "data"}:
        return f"{arguments[0]} needs {', '.join(map(str.upper, names))}: see `{program(arguments[0])} --help`"
    if not config_files(arguments):
        if arguments[0] in EVALUATIONS:
            return f"{arguments[0]} needs a run: {program(arguments[0])} RUN"
        found = [str(file) for file in sorted(Path("configs").glob("*.yaml"))]
        there = f"; available: {', '.join(found)}" if found else " (the project has some in configs/)"
        example = "configs/gpt.yaml" if "configs/gpt.yaml" in found else (found or ["FILE"])[0]
        return f"{arguments[0]} needs a config: {program(arguments[0])} --config {example}{there}"
    return f"{' and '.join(config_files(arguments))} has no {join_or(sorted(missing))} section: add " + " and ".join(
        f"`{name}: {{class_path: {'CausalLM' if name == 'model' else 'PretrainingData'}}}`" for name in sorted(missing)
    )


def wrong_value(text: str, match: re.Match, arguments: list[str]) -> str:
    """The sentence for a value whose type is not the one of its option."""
    option = option_of(text, match.start())
    end = text.find("Given value:", match.start())
    start = max((key.end() for key in messages.KEY.finditer(text, 0, match.start())), default=0)
    block = text[start : end if end >= 0 else len(text)]
    value = match["value"]
    if value is None and end >= 0:
        value = given_value(text[end:])
    for element in messages.EXPECTED.finditer(block):  # in a list of strings, such as names of columns
        wrong = value if element["value"] is None else element["value"]
        if "<class 'str'>" in element["type"] and re.fullmatch(r"True|False|None|[-+\d.e_]+|nan|inf", wrong or ""):
            read = {"True": "true", "False": "false", "None": "null"}.get(wrong, wrong)
            kind = {"true": "a boolean", "false": "a boolean", "null": "no value"}.get(read, "a number")
            return f"{place(option, arguments)} has {read}, which is {kind} in YAML: put it in quotes to make it text"
    subtypes = messages.TYPES.search(block)
    types = subtypes[1] if subtypes else match["type"]
    words, choices, classes = list[str](), list[str](), list[str]()
    for name, literal, container, length in messages.SUBTYPES.findall(types):
        if literal:
            choices += [part.strip(" '\"") for part in literal.split(",")]
        elif length:
            words.append(f"a list of {length} values")
        elif (name or container) == "tuple":
            words.append("a list of values")
        elif name in TYPES or container in TYPES:
            words.append(TYPES[name or container])
        elif name and name != "Tensor":
            classes.append(name)
    if classes:
        words.insert(0, f"the name of a {join_or(list(dict.fromkeys(classes)))} class")
    words = list(dict.fromkeys(words))
    if "a number" in words and "a whole number" in words:
        words.remove("a whole number")
    choices = list(dict.fromkeys(choices))
    null = ["null"] if "null" in words else []
    words = [f"one of {', '.join(choices)}"] * bool(choices) + [word for word in words if word != "null"] + null
    close = difflib.get_close_matches(str(value), choices, n=1)
    meant = f": did you mean {close[0]}?" if close else ""
    return f"{place(option, arguments)} is {shown(value)}, but must be {join_or(words) or 'of another type'}{meant}"
