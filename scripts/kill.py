"""Kills a run at random moments, resumes it each time, and compares it at the end with a run that was never killed.

    python scripts/kill.py --kills 20 --config configs/gpt.yaml --trainer.max_steps 30 --last.every_n_train_steps 1

All options except `--kills`, `--seed` and `--processes` are passed to `fit`. Exits with 1 if no complete checkpoint is
left, or if samples, metrics or weights differ. The processes are forks of this one, which has imported all that they
need, so a kill costs a second.
"""

import argparse
import csv
import gc
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.utils.tensorboard  # noqa: F401 (so that the forks need not)
from lightning.pytorch import Callback, LightningModule, Trainer

import lm_lightning.cli.app  # noqa: F401 (so that the forks need not)
from lm_lightning import run as runs
from lm_lightning.__main__ import main as command_line
from lm_lightning.checkpoints.files import OLD
from lm_lightning.checkpoints.loading import load_checkpoint


class Samples(Callback):
    """Writes to `order.jsonl` of the run folder which samples each micro-batch of each process has."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: dict, batch_idx: int) -> None:
        place = [trainer.global_step, batch_idx % trainer.accumulate_grad_batches, trainer.global_rank]
        with open(Path(trainer.default_root_dir) / "order.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps([place, batch["id"]]) + "\n")


def start(processes: int, folder: Path, name: str, *flags: str) -> set[int]:
    """Starts `fit` in forks, as a launcher does, and returns their process numbers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    if "--ckpt_path" not in flags:
        os.environ[runs.ENVIRONMENT] = str(runs.make_run(Path(folder) / name, runs.now()))
    forks = set()
    for rank in range(processes):
        process = os.fork()
        if process == 0:
            output = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
            sys.argv = ["lm_lightning", "fit", *flags, "--name", name, "--trainer.callbacks+", "kill.Samples"]
            status = 1
            try:
                command_line()
                status = 0
            except SystemExit as exit:
                status = exit.code if isinstance(exit.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        forks.add(process)
    return forks


def wait(processes: set[int], seconds: float) -> list[int]:
    """The exit statuses of those processes that end within some seconds; `processes` keeps the others."""
    end, statuses = time.monotonic() + seconds, []
    while processes and time.monotonic() < end:
        for process in list(processes):
            number, status = os.waitpid(process, os.WNOHANG)
            if number:
                processes.remove(process)
                statuses.append(os.waitstatus_to_exitcode(status))
        time.sleep(0.002)
    return statuses


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of all runs of a name; that which is being replaced by a folder counts until this is there."""
    found = [*folder.glob("*/checkpoints/*.ckpt")]
    return found + [p for p in folder.glob(f"*/checkpoints/*.ckpt{OLD}") if p.with_suffix("") not in found]


def order(run: Path) -> dict[tuple, list[int]]:
    """The samples of each step, micro-batch and process; those of steps that were done twice have to be the same."""
    result: dict[tuple, list[int]] = {}
    for line in (run / "order.jsonl").read_text(encoding="utf-8").splitlines():
        place, samples = json.loads(line)
        before = result.setdefault(tuple(place), samples)
        if before != samples:
            raise SystemExit(f"step {place[0]} had samples {before}, and {samples} when it was done again")
    return result


def metrics(run: Path) -> list[dict]:
    """What was logged, without what depends on the clock."""
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    clock = ("tokens_per_second", "seconds", "mfu", "memory", "epoch")
    return [{k: v for k, v in row.items() if v and not k.endswith(clock)} for row in rows]


def main() -> None:
    """Runs, kills, compares."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=20, help="number of times that the run is killed")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument(
        "--processes", type=int, default=1, help="number of processes of the run, one of which is killed at random"
    )
    options, flags = parser.parse_known_args()
    draw = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="kill-"))
    flags += ["--runs_dir", str(folder)]

    gc.collect()
    gc.freeze()  # else a collection in a fork would copy all pages of what is imported here
    begin = time.monotonic()
    whole_run = start(options.processes, folder, "whole", *flags)
    if any(wait(whole_run, 3600)) or whole_run:
        raise SystemExit(f"the run fails without being killed: see {folder}/whole.log")
    duration = time.monotonic() - begin
    (whole,) = (folder / "whole").iterdir()

    kills, ended, names = 0, 0, ["cut1"]
    while True:
        name = names[-1]
        if list((folder / name).glob("*/model")):  # this run is complete
            if kills >= options.kills:
                break
            name = f"cut{len(names) + 1}"
            names.append(name)
        goes_on = ["--ckpt_path", "last"] if checkpoints(folder / name) else []
        running = start(options.processes, folder, name, *flags, *goes_on)
        statuses = wait(running, draw.uniform(0.1, 1) * duration if kills < options.kills else 3600)
        if running:
            os.kill(draw.choice(sorted(running)), signal.SIGKILL)
            wait(running, 5)
            ended += bool(running)  # they were waiting for the other to start: their launcher ends them
            for process in running:
                os.kill(process, signal.SIGKILL)
            wait(running, 20)
            kills += 1
            for checkpoint in checkpoints(folder / name):
                load_checkpoint(checkpoint)
        elif any(statuses) or not list((folder / name).glob("*/model")):
            raise SystemExit(f"the run does not go on: see {folder}/{name}.log")

    for name in names:
        cut = max((folder / name).iterdir())  # those before were killed before they had a checkpoint
        if order(cut) != order(whole):
            raise SystemExit(f"{cut} has other samples than {whole}")
        if metrics(cut) != metrics(whole):
            raise SystemExit(f"{cut} has other metrics than {whole}")
        states = [load_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"] for run in (cut, whole)]
        if not all(torch.equal(states[0][key], states[1][key]) for key in states[1]):
            raise SystemExit(f"{cut} has other weights than {whole}")
    print(f"{kills} kills in {len(names)} runs: samples, metrics and weights are those of a run that was never killed")
    if ended:
        print(f"after {ended} of the kills, the other processes went on waiting for the killed one, and were ended")


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(__file__))  # for kill.Samples
    main()
