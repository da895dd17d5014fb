"""Processes that this project starts: trials, ranks and measurements end with the process that has started them."""

import ctypes
import os
import signal
import sys

RUN_FOLDER = "LM_LIGHTNING_RUN"  # environment variable: the run folder, which the first process of a run has made
PARENT = "LM_LIGHTNING_PARENT"  # environment variable: the number of the process whose children should end with it


def end_with_parent() -> None:
    """Has this process killed when the command that has started it is gone, even by SIGKILL. (Linux only.)

    A command calls it first. Processes started by anything else, such as a shell or `torchrun`, are left alone.
    """
    parent, os.environ[PARENT] = os.environ.get(PARENT, ""), str(os.getpid())
    if sys.platform != "linux" or not parent.isdecimal():
        return
    if int(parent) == os.getppid():
        kill_with_parent()
    if int(parent) != os.getppid() and gone(int(parent)):  # it had ended before
        os._exit(128 + signal.SIGKILL)


def gone(process: int) -> bool:
    """Whether a process has ended; also one that remains as a zombie, as where the first process of a container does
    not wait for its children. (Linux only.)
    """
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] in ("Z", "X")
    except OSError:
        return True


def kill_with_parent() -> None:
    """Has Linux kill this process as soon as its parent has ended."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
