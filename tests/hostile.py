"""Damaged and forged files: seeded mutations, and a guard that notes what must not happen while they are read."""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lm_lightning.errors import UserError

HOSTILE: list[Any] = [None, True, -1, 0, 2**31 - 1, 2**63, 1e308, float("inf"), float("nan"), "", "x" * 100_000]
HOSTILE += ["../../harmed", "/tmp/harmed", "a\0b", "\x1b[2J", "os.system", "{}", [], {}, [[[[[[]]]]]], {"a": {"b": []}}]


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.file),)


def mutated_bytes(content: bytes, draw: random.Random) -> bytes:
    """Bytes with one kind of damage: flipped, cut, doubled, overwritten or replaced."""
    data, at = bytearray(content), draw.randrange(len(content) or 1)
    kind = draw.randrange(6)
    if kind == 0:
        for _ in range(draw.randint(1, 8) if data else 0):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at:at] = data[: draw.randint(1, 200)]
    elif kind == 3:
        data[at : at + 8] = draw.choice([b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7, draw.randbytes(8)])
    elif kind == 4:
        del data[at : at + draw.randint(1, 100)]
    else:
        data = bytearray(draw.randbytes(draw.randint(0, 300)))
    return bytes(data)


def mutated_json(value: Any, draw: random.Random) -> Any:
    """JSON with one value changed, removed or added."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        changed = dict(value)
        kind = draw.random()
        if kind < 0.1:
            del changed[key]
        elif kind < 0.15:
            changed[str(draw.choice(HOSTILE))[:50]] = changed.pop(key)
        else:
            changed[key] = mutated_json(value[key], draw)
        return changed
    if isinstance(value, list) and value and draw.random() < 0.9:
        at = draw.randrange(min(len(value), 50))
        return [*value[:at], mutated_json(value[at], draw), *value[at + 1 :]]
    return draw.choice(HOSTILE)


def mutate(file: Path, number: int) -> None:
    """Damages a file, as text or as JSON."""
    draw = random.Random(number)
    content = file.read_bytes()
    if file.suffix in (".json", ".jsonl") and draw.random() < 0.7:
        lines = content.decode().splitlines() if file.suffix == ".jsonl" else [content.decode()]
        at = draw.randrange(len(lines))
        lines[at] = json.dumps(mutated_json(json.loads(lines[at]), draw))
        content = "\n".join(lines).encode()
    else:
        content = mutated_bytes(content, draw)
    file.write_bytes(content)


class Guard:
    """Notes, by Python's audit events, what must not happen while a hostile file is read.

    Attributes:
        folder: Where files may be written; None while nothing is watched.
        harm: What has happened.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.harm: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple) -> None:
        if self.folder is None:
            return
        if event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "os.fork", "socket.connect"):
            self.harm.append(f"{event} {arguments}")
        opened = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if opened or event in ("os.mkdir", "os.rename", "os.remove", "os.symlink", "os.link"):
            path = arguments[0]
            if event == "os.remove" and arguments[1] != -1:  # relative to an open folder, as in shutil.rmtree
                path = Path(os.readlink(f"/proc/self/fd/{arguments[1]}"), path)
            self.written(event, path)

    def written(self, event: str, path: Any) -> None:
        allowed = (str(self.folder), "/dev/null", "/dev/shm", "/tmp/tmp")
        if isinstance(path, (str, Path)) and not str(Path(path).absolute()).startswith(allowed):
            self.harm.append(f"{event} {path}")

    @contextlib.contextmanager
    def watch(self, folder: Path, seconds: int) -> Iterator[None]:
        def hang(*_: object) -> None:
            raise TimeoutError(f"not done in {seconds} s")

        before = signal.signal(signal.SIGALRM, hang)
        signal.alarm(seconds)
        self.folder = folder
        try:
            yield
        finally:
            self.folder = None
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)


def mutations(number: int) -> pytest.MarkDecorator:
    """As many seeds of mutations, a small part of them in a test that is not slow."""
    quick = number // 25
    parts = [range(quick), pytest.param(range(quick, number), marks=pytest.mark.slow)]
    return pytest.mark.parametrize("seeds", parts, ids=["some", "many"])


def attack(
    original: Path, read: Callable[[Path], Any], seeds: range, guard: Guard, tmp_path: Path, refuses: bool = True
) -> None:
    """Reads a copy of a folder, in which each time another file is damaged."""
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    refused = 0
    for number in seeds:
        file = files[number % len(files)]
        intact = file.read_bytes()
        mutate(file, number)
        try:
            with guard.watch(tmp_path, 10):
                read(folder)
        except UserError as error:
            refused += 1
            assert len(str(error)) < 1500 and "\n" not in str(error).strip(), str(error)
        except Exception as error:
            raise AssertionError(f"mutation {number} of {file.name}: {type(error).__name__}: {error}") from error
        assert not guard.harm, (number, file.name, guard.harm)
        file.write_bytes(intact)
    assert refused > len(seeds) / 20 or not refuses  # else nothing was really damaged
