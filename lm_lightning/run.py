"""Run folder: `runs/<name>/<time>/`, which contains all files of a run; features add the ones in docs/checkpoints.md.

config.yaml        all settings except secrets; `fit --config RUN/config.yaml` repeats the run, and `validate RUN`,
                   `test RUN` and `predict RUN` use it
data.json          where the tokens came from and how many there are
environment.json   versions, machine and git commit
tokenizer/         from_pretrained folder
checkpoints/       last.ckpt to resume from, best.ckpt of the best validation
metrics.csv        and tensorboard/: the logged metrics
model/             from_pretrained folder: the network of the best (or last) checkpoint, its tokenizer, and
                   training.json, which names the training step
adapter/           with model.adapter: the trained adapter by itself
evaluations/       a folder for each `validate`, `test` or `predict` of this run, named `<time>-<command>`:
    config.yaml        its complete settings
    evaluation.json    weights, checkpoint, split, data and metrics
    predictions.jsonl  from `predict`; also predictions.csv for rows of CSV and TSV files

An evaluation of weights that do not belong to a run, or with a different `--runs_dir` or `--name`, writes the same
files to `<runs_dir>/<name>/<time>-<command>/`.
"""

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from lm_lightning.console import printable
from lm_lightning.errors import UserError
from lm_lightning.processes import RUN_FOLDER as ENVIRONMENT
from lm_lightning.security import untrusted

PLACEHOLDER = "<run>"  # stands for the run folder in the values of options
TRAINING = "training.json"  # file in model/: the step from which the weights are, and its score
STORES: list = []  # keeps stores alive as long as this process
MADE: list[Path] = []  # folders that this process has made for its run, the run folder last


def new_run(parent: Path, suffix: str = "") -> Path:
    """Creates a run folder, named by the time; processes of other ranks get the folder of rank 0.

    Args:
        parent: Folder in which it is created: the one of all runs of a name, or of all evaluations of a run.
        suffix: Appended to the folder's name.

    Raises:
        UserError: If it cannot be created.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun, which has a store for all processes
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        port, first = int(os.environ["MASTER_PORT"]), os.environ["RANK"] == "0"
        return shared_run(parent, suffix, port, False, first, attempt)
    if "LOCAL_RANK" in os.environ and ENVIRONMENT in os.environ:  # by Lightning
        return Path(os.environ[ENVIRONMENT])
    from lightning.fabric.plugins.environments import SLURMEnvironment

    if SLURMEnvironment.detect() and SLURMEnvironment.job_id() is not None:  # by srun: named by what all processes know
        parts = [os.environ.get(f"SLURM_{part}", "0") for part in ("JOB_ID", "STEP_ID", "RESTART_COUNT")]
        run = parent.absolute() / f"slurm-{'-'.join(parts)}{suffix}"
        return make_run(parent, run.name) if os.environ["SLURM_PROCID"] == "0" else run
    if {"MASTER_ADDR", "NODE_RANK"} <= os.environ.keys():  # manually, once on each node
        first = os.environ["NODE_RANK"] == "0"
        run = shared_run(parent, suffix, int(os.environ["MASTER_PORT"]) + 1, first, first)
    else:
        run = make_run(parent, now() + suffix)
    os.environ[ENVIRONMENT] = str(run)
    return run


def now() -> str:
    """The time, in the format of the names of run folders."""
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def shared_run(parent: Path, suffix: str, port: int, serve: bool, make: bool, attempt: object = 0) -> Path:
    """The run folder that rank 0 creates; the other ranks get its path from a store at `MASTER_ADDR`."""
    from torch.distributed import TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], port, is_master=serve, wait_for_workers=False)
    STORES.append(store)
    key = f"{ENVIRONMENT}/{attempt}"
    if make:
        store.set(key, str(make_run(parent, now() + suffix)))
    return Path(store.get(key).decode())


def make_run(parent: Path, name: str) -> Path:
    """Creates a folder of this name, or with a number appended if another run has the name."""
    for number in itertools.count(1):
        run = parent.absolute() / (name if number == 1 else f"{name}-{number}")
        new = [folder for folder in (run, *run.parents) if not folder.exists()]
        try:
            run.mkdir(parents=True)
        except FileExistsError:
            if not run.is_dir():
                raise UserError(f"cannot create the run folder {run}: a file of that name exists; remove it") from None
        except OSError as error:
            raise UserError(
                f"cannot create the run folder {run} ({error.strerror}): choose another --runs_dir"
            ) from error
        else:
            MADE[:] = reversed(new)
            return run
    raise AssertionError("unreachable")


@contextlib.contextmanager
def removed_if_refused() -> Iterator[None]:
    """Removes the run folder that this process has created, if the command fails before the run starts."""
    MADE.clear()
    try:
        yield
    except BaseException:
        if MADE and not (MADE[-1] / "config.yaml").exists():  # written when all checks have passed
            shutil.rmtree(MADE[-1], ignore_errors=True)
        raise
    finally:
        for folder in reversed(MADE):
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def experiment_folder(runs_dir: str, name: str) -> Path:
    """The folder of all runs of a name.

    Raises:
        UserError: If a folder cannot have this name.
    """
    untrusted.plain_name(name, "--name")
    return Path(runs_dir).expanduser().absolute() / name


def is_unfinished(run: Path, checkpoint: Path) -> bool:
    """Whether a run that is resumed from its own checkpoint had ended before it wrote `model/`."""
    return checkpoint.absolute().parent.parent == run.absolute() and not (run / "model").exists()


def describe_weights(about: dict[str, Any]) -> str:
    """The step of the weights of a model, and the score if one was monitored, as text."""
    score = f", {printable(about['metric'])} {about['score']:.4g}" if "metric" in about else ""
    return f"step {about['step']:,}{score}"


def find_run(path: str | Path) -> Path:
    """The run folder of a path: the path itself, or the run folder that contains it, as with `model/` or a checkpoint.

    Raises:
        UserError: If there is none.
    """
    given = Path(path).expanduser()
    for folder in (given, *given.absolute().parents[:2]):
        if is_run(folder):
            return folder
    if not given.exists():
        raise UserError(f"the run folder {path} does not exist")
    refuse_parent(given)
    raise UserError(f"{path} is not a run folder: it has no config.yaml of a run")


def refuse_parent(folder: Path) -> None:
    """Refuses a folder of several runs, such as `runs/gpt`, in place of a run.

    Raises:
        UserError: Names one of the runs.
    """
    if runs := sorted(str(run) for kind in ("*/", "*/*/") for run in folder.glob(kind) if is_run(run)):
        raise UserError(f"{folder} is not a run folder, but contains {len(runs)} of them: give one, such as {runs[-1]}")


def is_run(folder: Path) -> bool:
    """Whether a folder is the run folder of a training run, finished or not."""
    marks = ("tokenizer", "checkpoints", "metrics.csv")
    return (folder / "config.yaml").is_file() and any((folder / mark).exists() for mark in marks)


def pretrained_name(name: str | Path, part: Literal["model", "tokenizer"] = "model") -> str:
    """Converts a run, a `from_pretrained` folder or a name on the Hub to a name for `from_pretrained`.

    Args:
        name: A run folder stands for its `model/` or `tokenizer/`; anything else is returned as it is.
        part: Which of the two to return for a run folder.

    Raises:
        UserError: If it is a run that has no model because it has not finished, or a folder of several runs.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return str(name)
    marks = {"model": "config.json", "tokenizer": "tokenizer_config.json"}
    if (folder / part / marks[part]).is_file():
        return str(folder / part)
    if part == "tokenizer" or (folder / "config.json").is_file():
        return str(folder)
    if (folder / "checkpoints").is_dir():
        raise UserError(
            f"{name} is a run that has not finished, so it has no model/ yet: create it with "
            f"`python -m lm_lightning export {name}`"
        )
    refuse_parent(folder)
    return str(folder)


def model_folder(name: str | Path) -> Path:
    """The local `from_pretrained` folder of a run, or the folder itself if it is one.

    Raises:
        UserError: If it is neither.
    """
    folder = Path(pretrained_name(name))
    if not folder.is_dir():
        what = "is a file, but must be the folder of a run or a model" if folder.exists() else "does not exist"
        raise UserError(f"{name} {what}")
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{name} is neither a run folder nor a from_pretrained folder: it has no model/config.json and no "
            "config.json"
        )
    return folder
