"""Commands that get a Ctrl-C."""

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import forks


def ended_by_interrupt(status: int, errors: str) -> bool:
    return status == 130 and "Traceback" not in errors and "KeyboardInterrupt" not in errors


def interrupt(
    args: Sequence[object], when: Callable[[str, float], bool], executable: str = sys.executable
) -> tuple[int, str, float]:
    """Sends SIGINT to a command, as soon as its output or its age say so.

    Args:
        args: Of the command line.
        when: Gets what it has printed and how many seconds it has run.
        executable: What starts it: Python, or `forks.python("lm_lightning")`.

    Returns:
        Exit status, standard error, and how many seconds it was old, infinite if it had ended by itself.
    """
    server = forks.server() if executable != sys.executable else None
    before = set(descendants(server)) if server else set()
    process = subprocess.Popen(
        [executable, "-m", "lm_lightning", *map(str, args)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None

    def family() -> set[int]:
        return {*descendants(process.pid), *(descendants(server) if server else ())} - before

    while server and process.poll() is None and not any(map(leads_a_session, family())):
        time.sleep(0.01)  # a client of the server is not yet the command
    begin, output = time.monotonic(), ""
    os.set_blocking(process.stdout.fileno(), False)
    while process.poll() is None and not when(output, time.monotonic() - begin):
        output += (process.stdout.read() or b"").decode()
        time.sleep(0.02)
    age = time.monotonic() - begin if process.poll() is None else math.inf
    started = family()
    process.send_signal(signal.SIGINT)
    errors = process.stderr.read().decode()
    status = process.wait(120)
    deadline = time.monotonic() + 10  # for the system to reap what was killed
    while any(map(running, started)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(running, started))
    return status, errors, age


def descendants(process: int) -> list[int]:
    """The process numbers of a process's children and theirs."""
    children: dict[int, list[int]] = {}
    for child, parent in parents():
        children.setdefault(parent, []).append(child)
    found = [process]
    for parent in found:
        found += children.get(parent, [])
    return found[1:]


def parents() -> Iterator[tuple[int, int]]:
    """The process numbers of each process and its parent."""
    if sys.platform == "linux":
        for file in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended
                yield int(file.parent.name), int(file.read_text().rpartition(")")[2].split()[1])
    else:
        table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout.split()
        yield from zip(map(int, table[::2]), map(int, table[1::2]))


def leads_a_session(process: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(process) == process
    return False


def running(process: int) -> bool:
    """Whether a process is there and no zombie."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True).stdout
    return bool(state) and not state.startswith("Z")


def interrupt_at_any_time(args: Sequence[object], caches: Path, trains: Callable[[], bool] = lambda: False) -> None:
    """Interrupts a command in the middle of all that it does from its first line on.

    Args:
        args: Of the command line.
        caches: Where each start of it has an own, empty cache.
        trains: Whether all that is to be interrupted was done; default: interrupted until it ends by itself.
    """

    executable = forks.python("lm_lightning")

    def start(name: str, when: Callable[[str, float], bool]) -> tuple[int, str, float]:
        return interrupt([*args, "--data.cache_dir", caches / name], when, executable)

    def timed(name: str, when: Callable[[str, float], bool]) -> tuple[int, str, float, float]:
        begin = time.monotonic()
        return *start(name, when), time.monotonic() - begin

    status, errors, age, duration = timed("whole", lambda *_: trains())
    assert status == 0 if math.isinf(age) else ended_by_interrupt(status, errors), (status, errors)
    interrupted = 0
    for part in (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95):
        status, errors, _, seconds = timed(str(part), lambda _, age, part=part, whole=duration: age > part * whole)
        if status == 0:  # it had finished, perhaps while the signal was on its way
            duration = seconds  # the machine is less busy than before
            continue
        assert ended_by_interrupt(status, errors), (part, status, errors)
        interrupted += 1
    assert interrupted >= 4
