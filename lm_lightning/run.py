"""Run folder: `runs/<name>/<time>/`, which holds all that a run is.

config.yaml        complete but for secrets; `fit --config` of it runs the run again, and `validate RUN` and the like
                   evaluate with it
data.json          where the tokens came from and how many there are
environment.json   versions, machine and git commit
tokenizer/         from_pretrained folder
checkpoints/       last.ckpt to resume from, best.ckpt of the best validation
metrics.csv        and tensorboard/: what was logged
wandb/             of a run of W&B: its id, and what is or was to be sent
samples.jsonl      what a GPT wrote at each validation
spikes.jsonl       steps whose loss was far above those before, with their training samples
results.csv        and results.md: how well labels or answers were predicted in the last validation of the training;
                   also confusion.csv and .png
model/             from_pretrained folder: the network of the best checkpoint (or the last one) with its tokenizer, and
                    training.json, which names its step
adapter/           of LoRA: what was trained, as a folder of peft's
report.html        all of this to look at
evaluations/       a folder for each `validate`, `test` and `predict` of this run, named `<time>-<command>`:
    config.yaml        its complete settings
    evaluation.json    what was evaluated: weights, checkpoint, split, data and metrics
    predictions.jsonl  of `predict`; of rows of CSV and TSV files also predictions.csv, of a SentenceEncoder index/
    results.csv        and the other tables of `validate` and `test`

An evaluation of weights that belong to no run, or with another `--runs_dir` or `--name`, is `<runs_dir>/<name>/<time>-
<command>/`, with the same files.
"""

import contextlib
import itertools
import os
import shutil
import zipfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Optional

from lm_lightning import untrusted
from lm_lightning.console import printable
from lm_lightning.errors import UserError

PLACEHOLDER = "<run>"  # in the value of an option: the run folder
TRAINING = "training.json"  # in model/: which step the weights are from, and its score
OLD = ".old"  # ends the name of a sharded checkpoint while another takes its place
STORES: list = []  # live as long as this process does
MADE: list[Path] = []  # folders that this process has made for its run, the run folder last
ENVIRONMENT = "LM_LIGHTNING_RUN"  # tells the processes of the other ranks which folder the first one has made


def new_run(parent: Path, suffix: str = "") -> Path:
    """Makes a run folder, named by the time; a process that was started as another rank gets that of the first.

    Args:
        parent: Folder in which it is made: that of all runs of a name, or of all evaluations of a run.
        suffix: Ends the folder's name.

    Raises:
        UserError: If it cannot be made.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun, which keeps a store that all processes reach
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
    """The time, as run folders are named by it."""
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def shared_run(parent: Path, suffix: str, port: int, serve: bool, make: bool, attempt: object = 0) -> Path:
    """The run folder that the first process makes and the others are told of, through a store at `MASTER_ADDR`."""
    from torch.distributed import TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], port, is_master=serve, wait_for_workers=False)
    STORES.append(store)
    key = f"{ENVIRONMENT}/{attempt}"
    if make:
        store.set(key, str(make_run(parent, now() + suffix)))
    return Path(store.get(key).decode())


def make_run(parent: Path, name: str) -> Path:
    """Makes a folder that no other run has: of this name, or with a number after it."""
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
    """Removes the run folder that this process has made, if the command ends before there is a run in it."""
    MADE.clear()
    try:
        yield
    except BaseException:
        if MADE and not (MADE[-1] / "config.yaml").exists():  # which is written when nothing is left to refuse
            shutil.rmtree(MADE[-1], ignore_errors=True)
        raise
    finally:
        for folder in reversed(MADE):
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def runs_of(runs_dir: str, name: str) -> Path:
    """The folder of all runs of a name.

    Raises:
        UserError: If the name is none for a folder.
    """
    untrusted.plain_name(name, "--name")
    return Path(runs_dir).expanduser().absolute() / name


def last_checkpoint(runs_dir: str, name: str, which: str = "last") -> Path:
    """A checkpoint of the newest run of a name, see `checkpoint_in`.

    Raises:
        UserError: If there is none.
    """
    kinds = ("*.ckpt", f"*.ckpt{OLD}")
    checkpoints = [p for kind in kinds for p in runs_of(runs_dir, name).glob(f"*/checkpoints/{kind}")]
    if not checkpoints:
        raise UserError(
            f"there is no checkpoint to go on from: no {runs_dir}/{name}/*/checkpoints/last.ckpt; start without "
            "--ckpt_path, or name a checkpoint file"
        )
    # A job of SLURM's that was queued again goes on with its own run, whatever others of that name have done since.
    job = f"slurm-{os.environ.get('SLURM_JOB_ID')}-"
    checkpoints = [path for path in checkpoints if path.parent.parent.name.startswith(job)] or checkpoints
    folder = max(checkpoints, key=lambda path: path.stat().st_mtime).parent
    return usable_checkpoint(folder) if which == "last" else named_checkpoint(folder, which)


def usable_checkpoint(folder: Path) -> Path:
    """The latest checkpoint of a folder that is not damaged.

    Raises:
        UserError: If there is none.
    """
    errors = []
    for checkpoint in newest_first(folder):
        try:
            step = load_checkpoint(checkpoint, weights=False)["global_step"]
        except UserError as error:
            errors.append(error)
        else:
            if errors:
                print(f"{errors[0]}: going on from {checkpoint.name} of step {step}")
            return checkpoint
    if not errors:
        raise UserError(f"there is no checkpoint in {folder}")
    if len(errors) == 1:
        raise errors[0]
    reason = str(errors[0]).rpartition(": ")[0]  # its remedy is another checkpoint
    raise UserError(f"none of the {len(errors)} checkpoints of {folder} can be used, so start a new run ({reason})")


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the one of the latest step first; unreadable ones at the end, except `last.ckpt`."""

    def order(path: Path) -> tuple:
        try:
            step = float(load_checkpoint(path, weights=False, checked=True)["global_step"])
        except UserError:
            step = float("inf") if path.name == "last.ckpt" else -1
        return step, path.name == "last.ckpt", path.stat().st_mtime

    return sorted((path for kind in ("*.ckpt", f"*.ckpt{OLD}") for path in folder.glob(kind)), key=order, reverse=True)


def best_checkpoint(folder: Path) -> Path:
    """The checkpoint that the newest one of a folder has recorded as the best by `best.monitor`.

    Raises:
        UserError: If there is none.
    """
    for path in newest_first(folder):
        try:
            states = load_checkpoint(path, weights=False, checked=True).get("callbacks", {}).values()
        except UserError:
            continue
        for state in states:
            if isinstance(state, dict) and state.get("monitor") and state.get("best_model_score") is not None:
                if os.path.dirname(state["best_model_path"]) != str(state["dirpath"]):
                    continue  # of the run that this one was started from
                best = folder / os.path.basename(state["best_model_path"])
                if best.exists():
                    return best
                raise UserError(f"the best checkpoint {best} is missing: take another one of {folder}")
    raise UserError(
        f"there is no best checkpoint in {folder}: none was monitored (best.monitor, best.save_top_k) or validated"
    )


def named_checkpoint(folder: Path, name: str) -> Path:
    """The checkpoint of a folder that `best`, `last` or the name of its file means.

    Raises:
        UserError: If there is none.
    """
    stem = name.removesuffix(".ckpt")
    if stem == "best":
        return best_checkpoint(folder)
    if stem == "last" and not (folder / "last.ckpt").exists() and (own := newest_first(folder)):
        return own[0]
    return folder / f"{stem}.ckpt"


def run_of(checkpoint: Path) -> Optional[Path]:
    """The run folder that a checkpoint lies in, None if it lies elsewhere."""
    run = checkpoint.absolute().parent.parent
    return run if (run / "config.yaml").is_file() else None


def ended_early(run: Path, checkpoint: Path) -> bool:
    """Whether a run that goes on from its own last checkpoint was ended before it had made its model."""
    return checkpoint.absolute().parent.parent == run.absolute() and not (run / "model").exists()


def load_checkpoint(path: Path, weights: bool = True, checked: bool = False) -> dict:
    """Loads a checkpoint, a file whose tensors stay on disk until they are used, or a sharded folder.

    Args:
        path: The file or folder.
        weights: Whether the tensors of a folder are wanted, which are read and put together.
        checked: Whether its parts were compared with their checksums before.

    Raises:
        UserError: Names the file and what is wrong with it.
    """
    import torch

    from lm_lightning import sharded_checkpoint

    others = [other for kind in ("*.ckpt", f"*.ckpt{OLD}") for other in path.parent.glob(kind) if other != path]
    remedy = f"use another one of {path.parent}" if others else f"{path.parent} has no other one, so start a new run"
    sharded = (path / sharded_checkpoint.META).is_file()
    if not sharded and not path.is_file():
        raise UserError(f"there is no checkpoint file {path}")
    try:
        damaged: Optional[str] = None
        if sharded:
            damaged = None if checked else sharded_checkpoint.damaged(path)
        elif not checked:
            with zipfile.ZipFile(path) as file:
                untrusted.refuse_expanding_zip(file, path)
                damaged = file.testzip()  # torch.load does not compare the sums
        if damaged:
            raise UserError(f"the checkpoint {path} is damaged (the checksum of its part {damaged} is wrong): {remedy}")
        if sharded:
            return sharded_checkpoint.gather(path) if weights else sharded_checkpoint.meta(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except Exception as error:  # of damaged files, zipfile and pickle raise whatever they stumble over
        size = f" ({path.stat().st_size:,} bytes)" if path.is_file() else ""
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the checkpoint {path}{size} is cut short, damaged or none ({reason}): {remedy}") from error
    complete = isinstance(checkpoint, dict) and {"network", "state_dict", "global_step"} <= checkpoint.keys()
    if not complete or type(checkpoint["global_step"]) is not int:
        raise UserError(f"{path} is no checkpoint of lm_lightning: {remedy}")
    return checkpoint


def described(about: dict[str, Any]) -> str:
    """The step that the weights of a model are from, and its score if it was monitored, for the screen."""
    score = f", {printable(about['metric'])} {about['score']:.4g}" if "metric" in about else ""
    return f"step {about['step']:,}{score}"


def run_folder(path: str | Path) -> Path:
    """The run folder that a path names: itself, or a folder or file in it, such as `model/` or a checkpoint.

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
        raise UserError(f"{path} is no run folder, but has {len(runs)} of them in it: give one, such as {runs[-1]}")
    raise UserError(f"{path} is no run folder: it has no config.yaml of a run")


def is_run(folder: Path) -> bool:
    """Whether a folder is one of a training run, finished or not."""
    marks = ("tokenizer", "checkpoints", "metrics.csv")
    return (folder / "config.yaml").is_file() and any((folder / mark).exists() for mark in marks)


def folder_of(name: str | Path, part: Literal["model", "tokenizer"] = "model") -> str:
    """What to load a model or a tokenizer from, where a run, a `from_pretrained` folder or a Hub name is accepted.

    Args:
        name: Of a run folder, its `model/` or `tokenizer/` is meant; anything else is returned as it is.
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
    folder = Path(folder_of(name))
    if not folder.is_dir():
        raise UserError(f"the folder {name} does not exist")
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{name} is neither a run folder nor a from_pretrained folder: it has no model/config.json and no "
            "config.json"
        )
    return folder
