"""The one exception that is meant for the user, and how others become it."""

import importlib
import os
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
