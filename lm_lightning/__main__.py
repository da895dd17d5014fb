"""`python -m lm_lightning COMMAND ...`: hands the command line to the command that owns it."""

import argparse
import atexit
import difflib
import importlib
import logging
import multiprocessing
import os
import re
import signal
import sys

from lm_lightning import console, redaction
from lm_lightning.errors import UserError, first_process
from lm_lightning.explain import of_command_line, program
from lm_lightning.hub import TRUST
from lm_lightning.processes import end_with_parent
from lm_lightning.redaction import scrub
from lm_lightning.untrusted import TRUST_PACKAGES

# command -> module with a main() that reads sys.argv, and what it does
COMMANDS = {
    "fit": ("lm_lightning.cli", "train a model, resume with --ckpt_path last"),
    "validate": ("lm_lightning.cli", "metrics on the validation split"),
    "test": ("lm_lightning.cli", "metrics on the test split"),
    "predict": ("lm_lightning.cli", "predictions on the test split"),
    "prepare": ("lm_lightning.commands.prepare", "tokenize a corpus, show what is in it"),
    "generate": ("lm_lightning.commands.generate", "continue prompts with a trained model, or chat"),
    "search": ("lm_lightning.commands.search", "find the texts of an index that are nearest to a query"),
    "tune": ("lm_lightning.commands.tune", "search good values of flags, a learning rate, the largest micro-batch"),
    "verify": ("lm_lightning.commands.verify", "compare ways to run a config on this machine with a plain run"),
    "compress": ("lm_lightning.commands.compress", "quantize, prune or export a model, and measure what came of it"),
    "export": ("lm_lightning.commands.export", "make a from_pretrained folder of a checkpoint"),
    "report": ("lm_lightning.commands.report", "make one HTML page of runs: curves, samples, differences"),
}


# how torch.distributed tells that another process is gone
LOST = re.compile(r"(closed|reset) by peer|remote (process|worker)|Broken pipe")


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
    if command in ("-h", "--help"):
        print(f"usage: {program()} COMMAND [OPTIONS]\n\ncommands (each has its --help):")
        for name, (_, summary) in COMMANDS.items():
            print(f"  {name:10}{summary}")
        print("\n--trust_remote_code true: run the Python code that a model folder or Hub model has; default: false")
        print("--trust_package NAME: import classes of this package for a run's own config; may be repeated")
        return
    try:
        if command not in COMMANDS:
            if command.startswith("-"):
                raise UserError(f"the command comes first: {program('fit')} --config FILE")
            close = difflib.get_close_matches(command, COMMANDS, n=1)
            there = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(COMMANDS)}"
            raise UserError(f"there is no command {command}: {there}")
        # asked for, so that the tokenizers library does not warn of the loader's forks
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        # the profiler tells each of its steps, and PyTorch's C++ warns of what cannot be helped
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        # of kernels for GPUs that are not here, at each import, and of casts, at each layer
        for library in ("torchao", "torch.utils._pytree", "bitsandbytes"):
            logging.getLogger(library).setLevel(logging.ERROR)
        take_trust()
        importlib.import_module(COMMANDS[command][0])
        console.raise_on_interrupt()
        run(command)
        sys.stdout.flush()
    except BaseException as error:
        if console.interrupted:  # whatever has become of the KeyboardInterrupt
            console.end_children()
            sys.exit(console.INTERRUPTED)
        explain(error)
        raise
    finally:
        console.exit_on_interrupt()


def take_trust() -> None:
    """Takes `--trust_remote_code true` and `--trust_package NAME` off the command line.

    They are options of all commands, which no config can give. Environment variables pass them on to all processes.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--trust_remote_code", choices=["true", "false"])
    parser.add_argument("--trust_package", action="append", default=[])
    try:
        given, sys.argv[1:] = parser.parse_known_args(sys.argv[1:])
    except argparse.ArgumentError as error:
        needs = "true or false" if "trust_remote_code" in str(error) else "the name of a package"
        option = "--trust_remote_code" if "trust_remote_code" in str(error) else "--trust_package"
        raise UserError(f"{option} must be {needs}") from None
    if given.trust_remote_code is not None:
        os.environ[TRUST] = str(int(given.trust_remote_code == "true"))
    if packages := [name for names in given.trust_package for name in re.split(r"[\s,\[\]]+", names) if name]:
        if wrong := next((name for name in packages if not all(map(str.isidentifier, name.split(".")))), None):
            raise UserError(f"--trust_package is {wrong}, but must be the name of a package, such as my_package")
        os.environ[TRUST_PACKAGES] = ",".join(packages)


def explain(error: BaseException) -> None:
    """Ends the process with a sentence, if the error is one that needs no traceback."""
    if isinstance(error, UserError):
        if first_process():
            print(f"error: {console.printable(scrub(str(error), sys.argv))}", file=sys.stderr)
        sys.exit(2)
    if isinstance(error, RuntimeError) and LOST.search(str(error)):
        # The process that has ended tells why; a traceback of each that waited for it would only hide that.
        sys.exit("this process ends, since another one of its run has ended")
    if isinstance(error, BrokenPipeError):
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # the reader of the output has ended, as in `generate ... | head -1`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + signal.SIGPIPE)


def run(command: str) -> None:
    """Runs a command on the rest of `sys.argv`.

    Raises:
        UserError: Whatever the user can mend.
    """
    from lm_lightning import imports

    try:
        with imports.scope():
            importlib.import_module(COMMANDS[command][0]).main()
    except argparse.ArgumentError as error:
        raise of_command_line(error, sys.argv[1:]) from error


if __name__ == "__main__":
    main()
elif multiprocessing.parent_process() is not None:  # started by `spawn`, which imports this file first
    console.exit_on_interrupt()
