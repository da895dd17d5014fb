"""Kills a run at random times, resumes it each time, and compares the result with a run that was never killed.

    python scripts/kill.py --kills 20 --config configs/gpt.yaml --trainer.max_steps 30 --last.every_n_train_steps 1

All other flags are passed to `fit`. The exit status is 1 if there is no complete checkpoint after a kill, or if
samples, metrics or weights differ. The processes are forks of this one, which has imported everything that they need,
so that a run starts within a second.
"""

import argparse
import csv
import gc
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.utils.tensorboard  # noqa: F401 (imported here, so that the forks need not import it)
from lightning.pytorch import Callback, LightningModule, Trainer

import lm_lightning.cli.app  # noqa: F401 (imported here, so that the forks need not import it)
from lm_lightning import run as runs
from lm_lightning.__main__ import main as command_line
from lm_lightning.checkpoints.files import OLD
from lm_lightning.checkpoints.loading import load_checkpoint
from lm_lightning.processes import free_ports


class Samples(Callback):
    """Writes the samples of each micro-batch of each process to `order.jsonl` in the run folder."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: dict, batch_idx: int) -> None:
        place = [trainer.global_step, batch_idx % trainer.accumulate_grad_batches, trainer.global_rank]
        with open(Path(trainer.default_root_dir) / "order.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps([place, batch["id"]]) + "\n")


def start(processes: int, folder: Path, name: str, *flags: str) -> set[int]:
    """Starts `fit` in forks, as a launcher does, and returns their process IDs."""
    port = free_ports(1)
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
    """Waits for processes, and returns the exit statuses of those that end in time; the others stay in `processes`."""
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
    """The checkpoints of all runs with a name, including one that was renamed and has not been replaced yet."""
    found = [*folder.glob("*/checkpoints/*.ckpt")]
    return found + [p for p in folder.glob(f"*/checkpoints/*.ckpt{OLD}") if p.with_suffix("") not in found]


def order(run: Path) -> dict[tuple, list[int]]:
    """The samples of each step, micro-batch and process; a repeated step must have the same samples."""
    result: dict[tuple, list[int]] = {}
    for line in (run / "order.jsonl").read_text(encoding="utf-8").splitlines():
        place, samples = json.loads(line)
        before = result.setdefault(tuple(place), samples)
        if before != samples:
            raise SystemExit(f"step {place[0]} had the samples {before}, but {samples} when it was repeated")
    return result


def metrics(run: Path) -> list[dict]:
    """The logged metrics, without those that depend on the clock."""
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    clock = ("tokens_per_second", "seconds", "mfu", "memory", "epoch")
    return [{k: v for k, v in row.items() if v and not k.endswith(clock)} for row in rows]


def main() -> None:
    """Reads the command line, runs and kills processes, and compares the runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="number of processes; a random one is killed")
    options, flags = parser.parse_known_args()
    draw = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="kill-"))
    flags += ["--runs_dir", str(folder)]

    gc.collect()
    gc.freeze()  # otherwise garbage collection in a fork would copy all pages of the imported modules
    begin = time.monotonic()
    running = start(options.processes, folder, "uninterrupted", *flags)
    if any(wait(running, 3600)) or running:
        raise SystemExit(f"the run fails even if it is not killed: see {folder}/uninterrupted.log")
    duration = time.monotonic() - begin
    (uninterrupted,) = (folder / "uninterrupted").iterdir()

    kills, ended, names = 0, 0, ["killed1"]
    while True:
        name = names[-1]
        if list((folder / name).glob("*/model")):  # this run is complete
            if kills >= options.kills:
                break
            name = f"killed{len(names) + 1}"
            names.append(name)
        resume = ["--ckpt_path", "last"] if checkpoints(folder / name) else []
        running = start(options.processes, folder, name, *flags, *resume)
        statuses = wait(running, draw.uniform(0.1, 1) * duration if kills < options.kills else 3600)
        if running:
            os.kill(draw.choice(sorted(running)), signal.SIGKILL)
            wait(running, 5)
            ended += bool(running)  # they wait for the killed process; a launcher would end them
            for process in running:
                os.kill(process, signal.SIGKILL)
            wait(running, 20)
            kills += 1
            for checkpoint in checkpoints(folder / name):
                load_checkpoint(checkpoint)
        elif any(statuses) or not list((folder / name).glob("*/model")):
            raise SystemExit(f"the run cannot be resumed: see {folder}/{name}.log")

    for name in names:
        killed = max((folder / name).iterdir())  # earlier ones were killed before they had a checkpoint
        if order(killed) != order(uninterrupted):
            raise SystemExit(f"the samples of {killed} differ from those of {uninterrupted}")
        if metrics(killed) != metrics(uninterrupted):
            raise SystemExit(f"the metrics of {killed} differ from those of {uninterrupted}")
        states = [load_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"] for run in (killed, uninterrupted)]
        if not all(torch.equal(states[0][key], states[1][key]) for key in states[1]):
            raise SystemExit(f"the weights of {killed} differ from those of {uninterrupted}")
    print(f"{kills} kills in {len(names)} runs: samples, metrics and weights equal those of an uninterrupted run")
    if ended:
        print(f"after {ended} of the kills, the other processes still waited for the killed one, and were ended")


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(__file__))  # for kill.Samples
    main()
