"""Saves the help of commands, so that it is printed at once: importing Lightning to find all options takes seconds."""

import contextlib
import hashlib
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from lm_lightning import files
from lm_lightning.cli.explain import program
from lm_lightning.data import cache
from lm_lightning.errors import first_process

FOLDER = f"{cache.DEFAULT}/help"
LIBRARIES = ("jsonargparse", "lightning", "torch", "transformers")  # whose options or docstrings are in the help


def print_help(command: str, make: Callable[[], Any]) -> None:
    """Prints the saved help of a command, or calls `make`, which prints it and exits, and saves what it prints.

    A saved help is used only if the code of this project, its configs and the libraries are the same as when it was
    saved. There is one for each width of the terminal.
    """
    width = shutil.get_terminal_size().columns
    try:
        folder = Path(FOLDER).expanduser()
    except RuntimeError:  # there is no home folder
        return make()
    file, key = folder / f"{command}-{width}.txt", key_of(command)
    with contextlib.suppress(OSError, ValueError):
        saved, _, text = file.read_text(encoding="utf-8").partition("\n")
        if saved == key:
            print(text, end="")
            return
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            make()
    except SystemExit as end:
        print(printed.getvalue(), end="")
        if not end.code and first_process():
            with contextlib.suppress(OSError):  # the next one takes seconds, too
                file.parent.mkdir(parents=True, exist_ok=True)
                files.write_text(file, f"{key}\n{printed.getvalue()}")
        raise


def key_of(command: str) -> str:
    """A digest of everything that determines the help of a command."""
    parts = [program(command), sys.version, *code()]
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            parts.append(f"{name} {metadata.version(name)}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def code() -> Iterator[str]:
    """Name, size and time of each file of this package, and the names of the configs that the help lists."""
    for folder, _, names in os.walk(Path(__file__).parent.parent):
        for name in names:
            if name.endswith(".py"):
                state = os.stat(os.path.join(folder, name))
                yield f"{folder}/{name} {state.st_size} {state.st_mtime_ns}"
    yield from map(str, sorted(Path("configs").glob("*.yaml")))
