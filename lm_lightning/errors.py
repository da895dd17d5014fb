"""The exception for errors that the user can correct, and how others become it."""

import importlib
import os
from typing import Any


class UserError(Exception):
    """A user-correctable error, explained in one sentence; `main()` prints it without a traceback and exits with 2."""


def package(name: str, what: str, extra: str) -> Any:
    """Imports an optional package.

    Args:
        name: Of the package, or of a module in it.
        what: The option or feature that needs it, for the message.
        extra: The extra of this project that installs it.

    Raises:
        UserError: If it is missing; gives the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UserError(f'{what} needs the package {package}: pip install -e ".[{extra}]"') from error


def first_process() -> bool:
    """Whether this is the first process of a run; the others have the same problems and need not report them, too."""
    return {os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID")} == {"0"}


def of_instance(error: Exception) -> UserError:
    """The error for a class that could not be made with the values of its options.

    If an option accepts several types, jsonargparse lists the reason against each of them, among these the error of the
    class itself.

    Args:
        error: Of the parser or the class.
    """
    text = str(error)
    if text.startswith("Does not validate against any of the Union"):
        tried = [line[4:] for line in text.splitlines() if line.startswith("  - ")]
        own = [line for line in tried if not line.startswith(("Expected a", "Not a valid subclass"))]
        text = " ".join(own) or text
    return UserError(" ".join(text.split())[:500])
