"""Run folder: `runs/<name>/<time>/`, which holds all that a run is.

config.yaml        complete; `fit --config` of it runs the run again
data.json          where the tokens came from and how many there are
environment.json   versions, machine and git commit
tokenizer/         from_pretrained folder
checkpoints/       last.ckpt to resume from, best.ckpt of the best validation
metrics.csv        and tensorboard/: what was logged
wandb/             of a run of W&B: its id, and what is or was to be sent
samples.jsonl      what a GPT wrote at each validation
spikes.jsonl       steps whose loss was far above those before, with their training samples
results.csv        and results.md: how well the last evaluation told labels or answers; also confusion.csv and .png
predictions.jsonl  and, of rows of CSV and TSV files, predictions.csv: what `predict` found
model/             from_pretrained folder: the network of the best checkpoint (or the last one) with its tokenizer, and
                   training.json, which names its step
adapter/           of LoRA: what was trained, as a folder of peft's
report.html        all of this to look at
"""

import itertools
import os
import zipfile
from datetime import datetime
from pathlib import Path
from typing import Any, Optional

from lm_lightning import untrusted
from lm_lightning.errors import UserError

PLACEHOLDER = "<run>"  # in the value of an option: the run folder
TRAINING = "training.json"  # in model/: which step the weights are from, and its score
OLD = ".old"  # ends the name of a sharded checkpoint while another takes its place
STORES: list = []  # live as long as this process does
ENVIRONMENT = "LM_LIGHTNING_RUN"  # tells the processes of the other ranks which folder the first one has made


def new_run(runs_dir: str, name: str) -> Path:
    """Makes a run folder, named by the time; a process that was started as another rank gets that of the first.

    Args:
        runs_dir: Folder of all runs.
        name: Name of the experiment, a folder in it.

    Raises:
        UserError: If it cannot be made.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun, which keeps a store that all processes reach
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        return shared_run(runs_dir, name, int(os.environ["MASTER_PORT"]), False, os.environ["RANK"] == "0", attempt)
    if "LOCAL_RANK" in os.environ and ENVIRONMENT in os.environ:  # by Lightning
        return Path(os.environ[ENVIRONMENT])
    from lightning.fabric.plugins.environments import SLURMEnvironment

    if SLURMEnvironment.detect() and SLURMEnvironment.job_id() is not None:  # by srun: named by what all processes know
        parts = [os.environ.get(f"SLURM_{part}", "0") for part in ("JOB_ID", "STEP_ID", "RESTART_COUNT")]
        run = Path(runs_dir).absolute() / name / f"slurm-{'-'.join(parts)}"
        return make_run(runs_dir, name, run.name) if os.environ["SLURM_PROCID"] == "0" else run
    if {"MASTER_ADDR", "NODE_RANK"} <= os.environ.keys():  # by hand, once on each node
        first = os.environ["NODE_RANK"] == "0"
        run = shared_run(runs_dir, name, int(os.environ["MASTER_PORT"]) + 1, first, first)
    else:
        run = make_run(runs_dir, name)
    os.environ[ENVIRONMENT] = str(run)
    return run


def shared_run(runs_dir: str, name: str, port: int, serve: bool, make: bool, attempt: object = 0) -> Path:
    """The run folder that the first process makes and the others are told of, through a store at `MASTER_ADDR`."""
    from torch.distributed import TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], port, is_master=serve, wait_for_workers=False)
    STORES.append(store)
    key = f"{ENVIRONMENT}/{attempt}"
    if make:
        store.set(key, str(make_run(runs_dir, name)))
    return Path(store.get(key).decode())


def make_run(runs_dir: str, name: str, time: Optional[str] = None) -> Path:
    """Makes a folder that no other run has, named by the time or something else."""
    untrusted.plain_name(name, "--name")
    time = time or datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for number in itertools.count(1):
        run = Path(runs_dir).absolute() / name / (time if number == 1 else f"{time}-{number}")
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
            return run
    raise AssertionError("unreachable")


def last_checkpoint(runs_dir: str, name: str) -> Path:
    """The checkpoint to go on from, in the newest run of a name: `last.ckpt`, or if that is damaged, the newest other.

    Raises:
        UserError: If there is none.
    """
    kinds = ("*.ckpt", f"*.ckpt{OLD}")
    checkpoints = [p for kind in kinds for p in (Path(runs_dir).absolute() / name).glob(f"*/checkpoints/{kind}")]
    if not checkpoints:
        raise UserError(
            f"there is no checkpoint to go on from: no {runs_dir}/{name}/*/checkpoints/last.ckpt; start without "
            "--ckpt_path, or name a checkpoint file"
        )
    # A job of SLURM's that was queued again goes on with its own run, whatever others of that name have done since.
    job = f"slurm-{os.environ.get('SLURM_JOB_ID')}-"
    checkpoints = [path for path in checkpoints if path.parent.parent.name.startswith(job)] or checkpoints
    folder = max(checkpoints, key=lambda path: path.stat().st_mtime).parent
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
    if not isinstance(checkpoint, dict) or not {"network", "state_dict", "global_step"} <= checkpoint.keys():
        raise UserError(f"{path} is no checkpoint of lm_lightning: {remedy}")
    return checkpoint


def described(about: dict[str, Any]) -> str:
    """The step that the weights of a model are from, and its score if it was monitored, for the screen."""
    score = f", {about['metric']} {about['score']:.4g}" if "metric" in about else ""
    return f"step {about['step']:,}{score}"


def model_folder(path: str) -> Path:
    """The `from_pretrained` folder that a run or a folder of weights means.

    Raises:
        UserError: If it is neither.
    """
    folder = Path(path)
    for candidate in (folder / "model", folder):
        if (candidate / "config.json").is_file():
            return candidate
    if (folder / "checkpoints").is_dir():
        raise UserError(
            f"{path} is a run that has not finished, so it has no model/ yet: make it with "
            f"`python -m lm_lightning export {path}`"
        )
    raise UserError(
        f"{path} is neither a run folder nor a from_pretrained folder: it has no model/config.json and no config.json"
    )
