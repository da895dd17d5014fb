"""Commands that get a Ctrl-C."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence


def ended_by_interrupt(status: int, errors: str) -> bool:
    return status == 130 and "Traceback" not in errors and "KeyboardInterrupt" not in errors


def interrupt(args: list[object], when: Callable[[str, float], bool]) -> tuple[int, str, float]:
    """Sends SIGINT to a command, as soon as its output or its age say so.

    Returns:
        Exit status, standard error, and how many seconds it was old, infinite if it had ended by itself.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "lm_lightning", *map(str, args)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    begin, output = time.monotonic(), ""
    assert process.stdout is not None and process.stderr is not None
    os.set_blocking(process.stdout.fileno(), False)
    while process.poll() is None and not when(output, time.monotonic() - begin):
        output += (process.stdout.read() or b"").decode()
        time.sleep(0.02)
    age = time.monotonic() - begin if process.poll() is None else math.inf
    children = children_of(process.pid)
    process.send_signal(signal.SIGINT)
    errors = process.stderr.read().decode()
    status = process.wait(120)
    deadline = time.monotonic() + 10  # for the system to reap what was killed
    while any(map(running, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(running, children))
    return status, errors, age


def children_of(process: int) -> list[int]:
    """The process numbers of a process's children and theirs."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True).stdout.split()
    return [int(child) for child in found] + [c for child in found for c in children_of(int(child))]


def running(process: int) -> bool:
    """Whether a process is there and no zombie."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True).stdout
    return bool(state) and not state.startswith("Z")


def interrupt_at_any_time(args: Sequence[object]) -> None:
    """Interrupts a command after more and more seconds, until it ends by itself."""
    for seconds in (1, 2, 4, 6, 8, 10, 13, 16):
        status, errors, age = interrupt([*args], lambda _, age, limit=seconds: age > limit)
        if math.isinf(age) or status == 0:  # it had finished, perhaps while the signal was on its way
            assert status == 0, errors
            break
        assert ended_by_interrupt(status, errors), (seconds, status, errors)
