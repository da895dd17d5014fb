"""The exception for errors that the user can correct."""

import importlib
import os
from typing import Any


class UserError(Exception):
    """A user-correctable error, explained in one sentence; `main()` prints it without a traceback and exits with 2."""


def package(name: str, what: str, extra: str = "") -> Any:
    """Imports an optional package.

    Args:
        name: Name of the package or of one of its modules.
        what: The option or feature that needs it, for the message.
        extra: The extra of this project that installs the package, if there is one.

    Raises:
        UserError: If the package is missing; the message has the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        remedy = f'-e ".[{extra}]"' if extra else package
        raise UserError(f"{what} needs the package {package}: pip install {remedy}") from error


def one_line(error: BaseException, most: int = 500) -> str:
    """The text of an error in one line, for a message; the name of its class if it has no text.

    Args:
        error: The error.
        most: Maximum number of characters.
    """
    return " ".join(str(error).split())[:most] or type(error).__name__


def first_process() -> bool:
    """Whether this is the first process of a run, the only one that reports problems: the others have the same ones."""
    return {os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID")} == {"0"}
