"""Processes end with the command that has started them, however it ends."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of their parent's death")

# as `tune` and `verify` start trials
STARTER = """
import json, sys
from pathlib import Path
from lm_lightning.tuning.fit_process import fit
print(fit(json.loads(sys.argv[1]), Path(sys.argv[2]), timeout=1000))
"""


def family(word: str) -> dict[int, str]:
    """The processes whose command line has a word, by their numbers."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if word in line and "Z" not in (file.parent / "stat").read_text().rpartition(")")[2].split()[0]:
            found[int(file.parent.name)] = line
    return found


@LINUX
@pytest.mark.slow
def test_trials_and_their_ranks_end_with_a_killed_command(recipe: Path, tmp_path: Path):
    flags = ["--config", str(recipe), "--trainer.strategy", "ddp", "--trainer.devices", "2"]
    flags += ["--trainer.max_steps", "1000000", "--model.schedule.warmup_steps", "1"]
    starter = subprocess.Popen([sys.executable, "-c", STARTER, json.dumps(flags), tmp_path])
    deadline = time.monotonic() + 240
    while len(family(f"fit --config {recipe}")) < 2:  # later, each rank would notice
        assert starter.poll() is None and time.monotonic() < deadline, (tmp_path / "err.txt").read_text()
        time.sleep(0.1)
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    deadline = time.monotonic() + 60
    while left := family(f"fit --config {recipe}"):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
