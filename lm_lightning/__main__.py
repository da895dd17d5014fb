"""`python -m lm_lightning COMMAND ...`: runs a command of the core or of a feature."""

import argparse
import atexit
import difflib
import importlib
import multiprocessing
import os
import signal
import sys

from lm_lightning import console, features, memory
from lm_lightning.cli import saved_help
from lm_lightning.cli.explain import command_line_error, program
from lm_lightning.compat import slow_imports
from lm_lightning.compat.torch import LOST_PEER, hide_messages
from lm_lightning.errors import UserError, first_process
from lm_lightning.processes import end_with_parent
from lm_lightning.security import redaction, trust
from lm_lightning.security.redaction import scrub

# Commands of the core: the module with a main() that reads sys.argv, and what it does
CORE = {
    "fit": ("lm_lightning.cli.app", "train a model; --ckpt_path last resumes it"),
    "validate": ("lm_lightning.cli.app", "compute the metrics on the validation split"),
    "test": ("lm_lightning.cli.app", "compute the metrics on the test split"),
    "predict": ("lm_lightning.cli.app", "write predictions for the test split"),
    "prepare": ("lm_lightning.commands.prepare", "tokenize a corpus before training and print statistics"),
    "export": ("lm_lightning.commands.export", "convert a checkpoint to a from_pretrained folder"),
}


def main() -> None:
    """Runs the command that `sys.argv` names.

    A `UserError` becomes one sentence and exit status 2; Ctrl-C ends with 130, without a traceback.
    """
    console.prepare()
    console.exit_on_interrupt()
    # Registered first, it runs last: the signal would kill a finished command while Python shuts down.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    redaction.install()
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    try:
        known = commands()
        if command in ("-h", "--help"):
            return print_help(known)
        if command not in known:
            if command.startswith("-"):
                raise UserError(f"the command comes first: {program('fit')} --config FILE")
            close = difflib.get_close_matches(command, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(known)}"
            raise UserError(f"there is no command {command}: {hint}")
        # The tokenizers library would otherwise warn about forked data loaders.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        memory.keep_freed_memory()
        hide_messages()
        slow_imports.defer()
        trust.read_options()
        if sys.argv[2:] in (["--help"], ["-h"]):
            saved_help.print_help(command, lambda: start(known[command][0], command))
        else:
            start(known[command][0], command)
        sys.stdout.flush()
    except BaseException as error:
        if console.interrupted:  # the KeyboardInterrupt may have become another error
            console.end_children()
            # If it was raised in an exec() of a string, which dataclasses use, Python remembers it until the next
            # exec() and would end with the signal, whatever the exit status is.
            exec("")  # noqa: S102
            sys.exit(console.INTERRUPTED)
        explain(error)
        raise
    finally:
        console.exit_on_interrupt()


def start(module: str, command: str) -> None:
    """Imports the module of a command, and runs the command."""
    importlib.import_module(module)
    console.raise_on_interrupt()
    run(command)


def commands() -> dict[str, tuple[str, str]]:
    """The module and the summary of each command, by name; commands of the core come first."""
    return CORE | features.commands()


def print_help(known: dict[str, tuple[str, str]]) -> None:
    """Prints the list of commands."""
    print(f"usage: {program()} COMMAND [OPTIONS]\n\ncommands (each has its --help):")
    for name, (_, summary) in known.items():
        print(f"  {name:10}{summary}")
    print(f"\n{trust.HELP}")


def explain(error: BaseException) -> None:
    """Exits with one sentence if the error needs no traceback."""
    if isinstance(error, UserError):
        if first_process():
            print(f"error: {console.printable(scrub(str(error), sys.argv))}", file=sys.stderr)
        sys.exit(2)
    if isinstance(error, RuntimeError) and LOST_PEER.search(str(error)):
        # That process prints the reason; tracebacks of all the processes that waited for it would only hide it.
        sys.exit("exiting: a peer process died")
    if isinstance(error, BrokenPipeError):
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # the reader of the output has ended, as in `generate ... | head -1`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + signal.SIGPIPE)


def run(command: str) -> None:
    """Runs a command on the rest of `sys.argv`.

    Raises:
        UserError: For any error that the user can fix.
    """
    from lm_lightning.security import imports

    try:
        with imports.scope():
            importlib.import_module(commands()[command][0]).main()
    except argparse.ArgumentError as error:
        raise command_line_error(error, sys.argv[1:]) from error


if __name__ == "__main__":
    main()
elif multiprocessing.parent_process() is not None:  # started by `spawn`, which imports this file first
    console.exit_on_interrupt()
