"""Processes that this project starts: trials, ranks and measurements end when the process that started them ends."""

import contextlib
import ctypes
import os
import random
import signal
import socket
import sys

RUN_FOLDER = "LM_LIGHTNING_RUN"  # environment variable: the run folder, created by the first process of a run
PARENT = "LM_LIGHTNING_PARENT"  # environment variable: the ID of the process whose children should end with it


def end_with_parent() -> None:
    """Makes Linux kill this process when the command that started it has ended, even by SIGKILL. (Linux only.)

    A command calls this first. Processes started by anything else, such as a shell or `torchrun`, are not affected.
    """
    parent, os.environ[PARENT] = os.environ.get(PARENT, ""), str(os.getpid())
    if sys.platform != "linux" or not parent.isdecimal():
        return
    if int(parent) == os.getppid():
        kill_with_parent()
    if int(parent) != os.getppid() and has_ended(int(parent)):  # it had ended before
        os._exit(128 + signal.SIGKILL)


def has_ended(process: int) -> bool:
    """Whether a process has ended. (Linux only.)

    Zombies count as ended: they remain, for example, where the first process of a container does not wait for its
    children.
    """
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] in ("Z", "X")
    except OSError:
        return True


def kill_with_parent() -> None:
    """Makes Linux kill this process as soon as its parent has ended."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def free_ports(number: int) -> int:
    """The first of successive ports that nobody uses, below those that the system gives to connections.

    A port of these could be taken before it is used. It is drawn with the system's randomness, as after a fit, `random`
    gives the same in each process.
    """
    while True:
        first = random.SystemRandom().randint(10_000, 32_000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:
            for port in range(first, first + number):
                held.enter_context(socket.create_server(("", port)))
            return first
