"""Progress: what a terminal of any width and a log file show of a run."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from conftest import command, needs
from forks import python

from lm_lightning.callbacks.progress import FORMAT, Line

LINE = re.compile(r"train (\d+)/10 \d+%, \d\d:\d\d left, [\d.]+ (?:steps/s|s/step)")


def in_a_terminal(columns: int, executable: str, *args: object) -> str:
    """What a command prints into a terminal of that width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [executable, "-m", "lm_lightning", *map(str, args)],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env=environment | {"TERM": "xterm"},
    )
    os.close(theirs)
    output = b""
    try:
        while part := os.read(ours, 65536):
            output += part
    except OSError:  # the process has ended
        pass
    os.close(ours)
    assert process.wait(60) == 0, output.decode()
    return output.decode()


@pytest.mark.parametrize(
    ("done", "seconds", "shown"),
    [
        (6, 2.0, "8/10 80%, 00:00 left, 3.00 steps/s, loss 2"),
        (2, 2.0, "4/10 40%, 00:06 left, 1.00 steps/s, loss 2"),
        (2, 6.38, "4/10 40%, 00:19 left, 3.19 s/step, loss 2"),
        (1, 125.0, "3/10 30%, 14:35 left, 125.00 s/step, loss 2"),
        (0, 0.0, "2/10 20%, ? left, ? steps/s, loss 2"),
    ],
)
def test_the_speed_reads_well_for_fast_and_slow_steps(done: int, seconds: float, shown: str):
    bar = Line(total=10, initial=2, unit="step", bar_format=FORMAT, file=io.StringIO(), desc="train")
    settings = bar.format_dict | {"n": 2 + done, "elapsed": seconds, "rate": None, "postfix": "loss 2"}
    assert Line.format_meter(**settings) == f"train {shown}"


@needs("generation")
@pytest.mark.parametrize("columns", [80, 40, 0])
@pytest.mark.slow
def test_a_terminal_shows_speed_and_time_left(recipe: Path, columns: int):
    flags = ("--trainer.callbacks+=lm_lightning.generation.samples.Samples",)
    executable = sys.executable if columns == 80 else python("lm_lightning")  # at least one that imports all
    output = in_a_terminal(columns, executable, "fit", "--config", recipe, *flags)
    updates = [part.strip("\n") for part in re.split(r"\r\n|\r", output) if part.strip("\n").startswith("train ")]
    assert all(len(line.rstrip()) <= (columns or 80) for line in updates if line.startswith("train "))
    shown = [line for line in updates if not line.startswith("train: ")]
    steps = [int(match[1]) for line in shown if (match := LINE.match(line))]
    assert steps or columns == 40
    assert "train 10/10 100%, " in output and "train 0/10 0%, " in output
    if columns != 40:
        assert any(re.search(r"(?:steps/s|s/step), loss \d\.\d+, [\d,]+ tokens/s", line) for line in shown)
    assert "] ," not in output and "e+0" not in "".join(shown)
    assert output.rindex("train 10/10") < output.index("model: ")
    assert not re.search(r"LOAD REPORT|Writing model shards|Loading weights|CPUAllocator|USDT", output)


@pytest.mark.slow
def test_a_log_file_has_lines_without_escape_codes(recipe: Path, fit):
    base = fit("--trainer.max_steps", 3, "--model.network.n_layer", 2) / "model"
    (base / "model.safetensors").rename(base / "whole.safetensors")
    import safetensors.torch

    tensors = safetensors.torch.load_file(base / "whole.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    safetensors.torch.save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    (base / "whole.safetensors").unlink()
    flags = ("--model.network", "null", "--model.pretrained", base, "--data.tokenizer.path", base)
    result = command("fit", "--config", recipe, *flags, "--trainer.log_every_n_steps", 4)
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stdout + result.stderr and "\r" not in result.stdout + result.stderr
    assert "LOAD REPORT" not in result.stderr and "has no weights for 1 tensors" in result.stdout
    lines = [line for line in result.stdout.splitlines() if line.startswith("train ")]
    assert [int(LINE.match(line)[1]) for line in lines] == [4, 8, 10]
    assert ", 512 tokens, " in lines[0] and ", 1,024 tokens, " in lines[1] and "tokens" not in lines[2]
    order = [line.split()[0] for line in result.stdout.splitlines() if not line.startswith("report: ")]
    assert order[-4:] == ["train", "validation", "finished:", "model:"]
