"""The one exception that is meant for the user, and how others become it."""

import importlib
import os
import re
from typing import Any


class UserError(Exception):
    """A mistake of the user's that one sentence explains; `main()` prints it without a traceback and exits with 2."""


def package(name: str, what: str, extra: str) -> Any:
    """A package that is not always needed.

    Args:
        name: Of the package, or a module in it.
        what: That needs it, for the message.
        extra: Of this project, which brings it.

    Raises:
        UserError: If it is missing; gives the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UserError(f'{what} needs the package {package}: pip install -e ".[{extra}]"') from error


def first_process() -> bool:
    """Whether this is the first process of a run; the others meet the same problems, and need not say so again."""
    return {os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID")} == {"0"}


# Lines in which jsonargparse tells of its own inner life.
NOISE = re.compile(
    r"Does not validate|Subtypes:|Errors:|- Expected a <class 'NoneType'>|Given value|- Problems? with given class_path"
)

# What a class that an option names may lack, and the extra that brings it.
MISSING = re.compile(r"(?:No module named '|import of )(bitsandbytes)\b")
EXTRAS = {"bitsandbytes": "lora"}


def of_command_line(error: Exception, arguments: list[str]) -> UserError:
    """The sentence for a command line or a YAML file that the parser refused.

    Args:
        error: The parser's, of many lines.
        arguments: The command and its arguments.
    """
    if missing := MISSING.search(str(error)):
        return UserError(f'an option names a class of {missing[1]}: pip install -e ".[{EXTRAS[missing[1]]}]"')
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip() and not NOISE.search(line))
    files = [value for flag, value in zip(arguments, arguments[1:]) if flag in ("-c", "--config")]
    where = f" (the config is {', '.join(files)})" if files else ""
    text = text if len(text) < 500 else text[:500] + " ..."
    return UserError(f"{text}{where}; `python -m lm_lightning {arguments[0]} --help` tells what is accepted")


def of_instance(error: Exception) -> UserError:
    """The sentence for an option's value of which its class could not be made.

    Where several types would do, jsonargparse tells of each why it was not that one; what a class itself has refused is
    among them.

    Args:
        error: The parser's, or a class's own.
    """
    text = str(error)
    if text.startswith("Does not validate against any of the Union"):
        tried = [line[4:] for line in text.splitlines() if line.startswith("  - ")]
        own = [line for line in tried if not line.startswith(("Expected a", "Not a valid subclass"))]
        text = " ".join(own) or text
    return UserError(" ".join(text.split())[:500])
