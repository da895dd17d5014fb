"""Console: printing that cannot fail, text that cannot control the terminal, and Ctrl-C without a traceback."""

import codecs
import contextlib
import locale
import multiprocessing
import os
import signal
import sys
import unicodedata
from types import FrameType
from typing import Any, Optional

INTERRUPTED = 128 + signal.SIGINT  # exit status, as shells have it
DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # characters that reorder the text after them
PATIENCE = 60  # seconds that child processes have to finish their step
interrupted = False


def prepare() -> None:
    """Makes this process and its children print characters that the console's encoding lacks as `\\uXXXX`.

    Without it, a sample with an umlaut on an ASCII or Latin-1 console would end a training run. Libraries open files,
    such as configs, in the encoding of the locale: where that is not UTF-8, the command is started again with UTF-8.
    """
    if os.name == "posix" and codecs.lookup(locale.getpreferredencoding(False)).name != "utf-8":
        os.environ |= {"PYTHONUTF8": "1", "PYTHONIOENCODING": sys.stdout.encoding}
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    # processes started by a strategy or a data loader have streams of their own
    encoding = os.environ.get("PYTHONIOENCODING", "").partition(":")[0]
    os.environ["PYTHONIOENCODING"] = f"{encoding}:backslashreplace"


def printable(text: str) -> str:
    """The text with control characters other than newline and tab as `\\uXXXX`, as in JSON.

    A terminal would obey them: move the cursor, change the title or colors, overwrite lines, write from right to left.
    """
    control = {c for c in set(text) if unicodedata.category(c) == "Cc" or c in DIRECTIONS} - {"\n", "\t"}
    return "".join(f"\\u{ord(c):04x}" if c in control else c for c in text)


def exit_on_interrupt() -> None:
    """Makes Ctrl-C (SIGINT) end this process at once with status 130, for times when there is nothing to clean up.

    An exception would not work: a `KeyboardInterrupt` during an import can surface as another error, or get lost.
    """
    signal.signal(signal.SIGINT, exit_interrupted)


def raise_on_interrupt() -> None:
    """Makes Ctrl-C raise `KeyboardInterrupt` and set `interrupted`, and a second Ctrl-C end this process at once."""
    signal.signal(signal.SIGINT, on_interrupt)
    sys.unraisablehook = on_unraisable


def on_interrupt(number: int, frame: Optional[FrameType]) -> None:
    """See `raise_on_interrupt`."""
    global interrupted
    interrupted = True
    exit_on_interrupt()
    raise KeyboardInterrupt


def on_unraisable(error: Any) -> None:
    """Ends the process where Python would print a `KeyboardInterrupt` and continue, as in a destructor."""
    if error.exc_type is KeyboardInterrupt:
        exit_interrupted()
    sys.__unraisablehook__(error)


def exit_interrupted(*_: Any) -> None:
    """Ends this process at once with status 130."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # it may have been interrupted while printing
            stream.flush()
    os._exit(INTERRUPTED)


def end_children() -> None:
    """Waits for the processes that the strategy started, which also received the Ctrl-C; kills those that remain."""
    for child in multiprocessing.active_children():
        child.join(0 if child.daemon else PATIENCE)
        if child.is_alive():
            child.kill()
