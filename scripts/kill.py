"""Kills a run at random moments, goes on with it each time, and compares it in the end with one that was never killed.

    python scripts/kill.py --kills 20 --config configs/gpt.yaml --trainer.max_steps 30 --last.every_n_train_steps 1

All but `--kills` and `--seed` goes to `fit`. Exits with 1 if a checkpoint is not whole, or if samples, metrics or
weights differ. The processes are forks of this one, which has imported all that they need, so a kill costs a second.
"""

import argparse
import csv
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

import lm_lightning.cli  # noqa: F401 (so that the forks need not)
from lm_lightning import run as runs
from lm_lightning.__main__ import main as command_line


class Samples(Callback):
    """Writes to `order.jsonl` of the run folder which samples each micro-batch has."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: dict, batch_idx: int) -> None:
        with open(Path(trainer.default_root_dir) / "order.jsonl", "a") as file:
            file.write(
                json.dumps([trainer.global_step, batch_idx % trainer.accumulate_grad_batches, batch["id"]]) + "\n"
            )


def start(name: str, log: Path, *flags: str) -> int:
    """Starts `fit` in a fork and returns its process number."""
    process = os.fork()
    if process == 0:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = ["lm_lightning", "fit", *flags, "--name", name, "--trainer.callbacks+", "kill.Samples"]
        status = 1
        try:
            command_line()
            status = 0
        except SystemExit as exit:
            status = int(exit.code or 0)
        finally:
            os._exit(status)
    return process


def wait(process: int, seconds: float) -> Any:
    """The exit status of a process, None if it is still running after some seconds."""
    end = time.monotonic() + seconds
    while True:
        number, status = os.waitpid(process, os.WNOHANG)
        if number or time.monotonic() > end:
            return os.waitstatus_to_exitcode(status) if number else None
        time.sleep(0.002)


def order(run: Path) -> dict[tuple, list[int]]:
    """The samples of each step and micro-batch; those of steps that were done twice have to be the same."""
    result: dict[tuple, list[int]] = {}
    for line in (run / "order.jsonl").read_text().splitlines():
        step, part, samples = json.loads(line)
        if result.setdefault((step, part), samples) != samples:
            raise SystemExit(f"step {step} had samples {result[step, part]}, and {samples} when it was done again")
    return result


def metrics(run: Path) -> list[dict]:
    """What was logged, without what depends on the clock."""
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        {k: v for k, v in row.items() if v and not k.endswith(("tokens_per_second", "mfu", "memory", "epoch"))}
        for row in rows
    ]


def main() -> None:
    """Runs, kills, compares."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options, flags = parser.parse_known_args()
    draw = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="kill-"))
    flags += ["--runs_dir", str(folder)]

    begin = time.monotonic()
    if wait(start("whole", folder / "whole.log", *flags), 3600) != 0:
        raise SystemExit(f"the run fails without being killed: see {folder}/whole.log")
    duration = time.monotonic() - begin
    (whole,) = (folder / "whole").iterdir()

    kills, names = 0, ["cut1"]
    while True:
        name = names[-1]
        if list((folder / name).glob("*/model")):  # this run is complete
            if kills >= options.kills:
                break
            name = f"cut{len(names) + 1}"
            names.append(name)
        begun = list((folder / name).glob("*/checkpoints/last.ckpt"))
        process = start(name, folder / f"{name}.log", *flags, *(["--ckpt_path", "last"] if begun else []))
        status = wait(process, draw.uniform(0.1, 1) * duration if kills < options.kills else 3600)
        if status is None:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            kills += 1
            for checkpoint in (folder / name).glob("*/checkpoints/*.ckpt"):
                runs.load_checkpoint(checkpoint)
        elif status != 0:
            raise SystemExit(f"the run does not go on: see {folder}/{name}.log")

    for name in names:
        cut = max((folder / name).iterdir())  # those before were killed before they had a checkpoint
        if order(cut) != order(whole):
            raise SystemExit(f"{cut} has other samples than {whole}")
        if metrics(cut) != metrics(whole):
            raise SystemExit(f"{cut} has other metrics than {whole}")
        states = [runs.load_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"] for run in (cut, whole)]
        if not all(torch.equal(states[0][key], states[1][key]) for key in states[1]):
            raise SystemExit(f"{cut} has other weights than {whole}")
    print(f"{kills} kills in {len(names)} runs: samples, metrics and weights are those of a run that was never killed")


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(__file__))  # for kill.Samples
    main()
