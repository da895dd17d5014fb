"""Run folder: `runs/<name>/<time>/`, which holds everything of a run.

config.yaml        complete except for secrets; `fit --config` of it repeats the run, and `validate RUN` and the like
                   evaluate with it
data.json          where the tokens came from and how many there are
environment.json   versions, machine and git commit
tokenizer/         from_pretrained folder
checkpoints/       last.ckpt to resume from, best.ckpt of the best validation
metrics.csv        and tensorboard/: what was logged
wandb/             of a run of W&B: its id, and the files that are or were to be sent
samples.jsonl      texts that a GPT generated at each validation
spikes.jsonl       steps whose loss was far above those before, with their training samples
results.csv        and results.md: scores of the labels or answers in the last validation of the training; also
                   confusion.csv and .png
model/             from_pretrained folder: the network of the best checkpoint (or the last one) with its tokenizer, and
                    training.json, which names its step
adapter/           of LoRA: the trained adapters, as a folder that peft loads
report.html        all of this as one page
evaluations/       a folder for each `validate`, `test` and `predict` of this run, named `<time>-<command>`:
    config.yaml        its complete settings
    evaluation.json    weights, checkpoint, split, data and metrics
    predictions.jsonl  of `predict`; of rows of CSV and TSV files also predictions.csv, of a SentenceEncoder index/
    results.csv        and the other tables of `validate` and `test`

An evaluation of weights that belong to no run, or with another `--runs_dir` or `--name`, is `<runs_dir>/<name>/<time>-
<command>/`, with the same files.
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

PLACEHOLDER = "<run>"  # in the value of an option: the run folder
TRAINING = "training.json"  # in model/: the step that the weights are from, and its score
STORES: list = []  # which live as long as this process
MADE: list[Path] = []  # folders that this process has made for its run, the run folder last


def new_run(parent: Path, suffix: str = "") -> Path:
    """Makes a run folder, named by the time; a process that was started as another rank gets that of rank 0.

    Args:
        parent: Folder in which it is made: that of all runs of a name, or of all evaluations of a run.
        suffix: Ends the folder's name.

    Raises:
        UserError: If it cannot be made.
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
    if {"MASTER_ADDR", "NODE_RANK"} <= os.environ.keys():  # by hand, once on each node
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
    """The run folder that rank 0 makes; the others get its path from a store at `MASTER_ADDR`."""
    from torch.distributed import TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], port, is_master=serve, wait_for_workers=False)
    STORES.append(store)
    key = f"{ENVIRONMENT}/{attempt}"
    if make:
        store.set(key, str(make_run(parent, now() + suffix)))
    return Path(store.get(key).decode())


def make_run(parent: Path, name: str) -> Path:
    """Makes a folder of this name, or with a number after it if another run has the name."""
    for number in itertools.count(1):
        run = parent.absolute() / (name if number == 1 else f"{name}-{number}")
        new = [folder for folder in (run, *run.parents) if not folder.exists()]
        try:
            run.mkdir(parents=True)
        except FileExistsError:
            if not run.is_dir():
                raise UserError(f"the run folder {run} cannot be made: a file of that name is in the way") from None
        except OSError as error:
            raise UserError(
                f"the run folder {run} cannot be made ({error.strerror}): choose another --runs_dir"
            ) from error
        else:
            MADE[:] = reversed(new)
            return run
    raise AssertionError("unreachable")


@contextlib.contextmanager
def removed_if_refused() -> Iterator[None]:
    """Removes the run folder that this process has made, if the command fails before the run starts."""
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
    """Whether a run that is resumed from its own checkpoint was ended before it wrote `model/`."""
    return checkpoint.absolute().parent.parent == run.absolute() and not (run / "model").exists()


def describe_weights(about: dict[str, Any]) -> str:
    """The step of the weights of a model, and the score if one was monitored, as text."""
    score = f", {printable(about['metric'])} {about['score']:.4g}" if "metric" in about else ""
    return f"step {about['step']:,}{score}"


def find_run(path: str | Path) -> Path:
    """The run folder of a path: itself, or that of a folder or file in it, such as `model/` or a checkpoint.

    Raises:
        UserError: If there is none.
    """
    given = Path(path).expanduser()
    for folder in (given, *given.absolute().parents[:2]):
        if is_run(folder):
            return folder
    if not given.exists():
        raise UserError(f"the run folder {path} does not exist")
    if runs := sorted(str(run) for kind in ("*/", "*/*/") for run in given.glob(kind) if is_run(run)):
        raise UserError(f"{path} is not a run folder, but contains {len(runs)} of them: give one, such as {runs[-1]}")
    raise UserError(f"{path} is not a run folder: it has no config.yaml of a run")


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a training run, finished or not."""
    marks = ("tokenizer", "checkpoints", "metrics.csv")
    return (folder / "config.yaml").is_file() and any((folder / mark).exists() for mark in marks)


def pretrained_name(name: str | Path, part: Literal["model", "tokenizer"] = "model") -> str:
    """The name for `from_pretrained`, where a user may give a run, a `from_pretrained` folder or a name on the Hub.

    Args:
        name: A run folder stands for its `model/` or `tokenizer/`; anything else is returned as it is.
        part: Which of both.

    Raises:
        UserError: If it is a run that has not finished, so that it has no model.
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
            f"{name} is a run that has not finished, so it has no model/ yet: make it with "
            f"`python -m lm_lightning export {name}`"
        )
    return str(folder)


def model_folder(name: str | Path) -> Path:
    """The local `from_pretrained` folder of a run or of a folder of weights.

    Raises:
        UserError: If it is neither.
    """
    folder = Path(pretrained_name(name))
    if not folder.is_dir():
        raise UserError(f"the folder {name} does not exist")
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{name} is neither a run folder nor a from_pretrained folder: it has no model/config.json and no "
            "config.json"
        )
    return folder
