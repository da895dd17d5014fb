"""Runs many commands in some processes that are started once: most of a run is its start.

`python processes.py COMMANDS`, where COMMANDS is a JSON file of lists `[run folder, command, argument, ...]`. What each
is refused with is written to `<run folder>/error`.
"""

import csv
import json
import os
import resource
import subprocess
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer


class Runs:
    """Commands that some processes run together, and what came of each.

    Args:
        folder: Where the run folders are made, by the names of the runs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, commands: dict[str, tuple]) -> None:
        """Runs `{name: (command, argument, ...)}`, each in two processes.

        Those whose names begin with `one` run in a single process, those with `nodes` in two on each of two nodes.
        """
        sizes = {"one": (1, 1), "nodes": (2, 2)}
        batches: dict[tuple[int, int], dict[str, tuple]] = {}
        for name, arguments in commands.items():
            size = next((size for start, size in sizes.items() if name.startswith(start)), (1, 2))
            batches.setdefault(size, {})[name] = arguments
        for size, batch in sorted(batches.items()):
            self.launch(*size, batch)

    def launch(self, nodes: int, processes: int, commands: dict[str, tuple]) -> None:
        from forks import python  # beside the tests, as processes.py itself is run from its own folder

        from lm_lightning.processes import free_ports

        file = self.folder / "commands.json"
        file.write_text(json.dumps([[str(self.folder / name), *map(str, c)] for name, c in commands.items()]))
        for name in commands:
            (self.folder / name).mkdir()
        port = free_ports(len(commands) + 2)
        environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        started = [
            subprocess.Popen(
                [python("lm_lightning"), __file__, file],
                env=environment | {"NODE_RANK": str(node), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for node in range(nodes)
            for rank in range(processes)
        ]
        try:
            outputs = []
            for process in started:
                outputs.append(process.communicate(timeout=600)[0])
                assert not process.returncode, "\n".join(outputs)[-6000:]  # the others would wait for it
        finally:
            for process in started:
                process.kill()

    def error(self, name: str) -> str:
        """What a run was refused with, empty if it was not."""
        file = self.folder / name / "error"
        return file.read_text() if file.exists() else ""

    def log(self, name: str, *columns: str) -> list[tuple[float, ...]]:
        """The rows of a run's metrics.csv that have all these columns."""
        assert not self.error(name), self.error(name)
        with open(self.folder / name / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        return [tuple(float(row[column]) for column in columns) for row in rows if row.get(columns[-1])]

    def differ(self, name: str, other: str, *columns: str) -> float:
        """The largest difference between what two runs have logged."""
        pairs = list(zip(self.log(name, *columns), self.log(other, *columns), strict=True))
        assert pairs, f"{name} has logged no {columns}"
        return max(abs(a - b) for row, other_row in pairs for a, b in zip(row, other_row))


class Order(Callback):
    """Writes which samples each optimizer step has, to `order.jsonl` in the run folder."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: dict, batch_idx: int) -> None:
        samples = pl_module.all_gather(torch.tensor(batch["id"])).flatten().tolist()
        if trainer.is_global_zero:
            with open(Path(trainer.default_root_dir) / "order.jsonl", "a") as file:
                file.write(json.dumps([trainer.global_step, samples]) + "\n")


class Full(Callback):
    """Lets no file of this process grow over 100 kB after some step, as if the disk were full."""

    def __init__(self, step: int) -> None:
        self.step, self.limits = step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, self.limits[1]))

    def on_exception(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)


class Noted(Callback):
    """Writes what a validation has found to a file: its metrics, and its tables and mistakes in the run folder.

    Args:
        file: Where.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            values = {name: float(value) for name, value in trainer.callback_metrics.items()}
            values = {name.removeprefix("val/"): value for name, value in values.items() if name.startswith("val/")}
            tables = [Path(trainer.default_root_dir) / name for name in ("results.csv", "confusion.csv")]
            found = {"values": values, "tables": [table.read_text() for table in tables if table.exists()]}
            mistakes = Path(trainer.default_root_dir) / "mistakes.jsonl"
            rows = map(json.loads, mistakes.read_text().splitlines() if mistakes.exists() else [])
            found["mistakes"] = {row["row"]: [row["correct"], row["predicted"]] for row in rows}
            self.file.write_text(json.dumps(found))


def main() -> None:
    for folder, *arguments in json.loads(Path(sys.argv[1]).read_text()):
        os.environ["LM_LIGHTNING_RUN"] = folder
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
        sys.argv = ["lm_lightning", *arguments]
        try:
            run(arguments[0])
        except UserError as error:
            Path(folder, "error").write_text(f"error: {error}")
        except Exception:
            Path(folder, "error").write_text(traceback.format_exc())
            raise
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    from lm_lightning.__main__ import run
    from lm_lightning.errors import UserError

    main()
