"""Run folder: `runs/<name>/<time>/`, which holds all that a run is.

config.yaml        complete; `fit --config` of it runs the run again
data.json          where the tokens came from and how many there are
environment.json   versions and machine
tokenizer/         from_pretrained folder
checkpoints/       last.ckpt to go on from, best.ckpt of the lowest validation loss
metrics.csv        and tensorboard/: what was logged
samples.jsonl      what a GPT wrote at each validation
spikes.jsonl       steps whose loss was far above those before, with their training samples
model/             from_pretrained folder: the trained network with its tokenizer
"""

import itertools
import os
import zipfile
from datetime import datetime
from pathlib import Path
from typing import Optional

from lm_lightning.errors import UserError

PLACEHOLDER = "<run>"  # in the value of an option: the run folder
ENVIRONMENT = "LM_LIGHTNING_RUN"  # tells the processes of the other ranks which folder the first one has made


def new_run(runs_dir: str, name: str) -> Path:
    """Makes a run folder, named by the time; a process that was started as another rank gets that of the first.

    Args:
        runs_dir: Folder of all runs.
        name: Name of the experiment, a folder in it.

    Raises:
        UserError: If it cannot be made.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun: the first rank tells the others through its store
        from torch.distributed import TCPStore

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False)
        key = f"{ENVIRONMENT}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        if os.environ["RANK"] == "0":
            store.set(key, str(make_run(runs_dir, name)))
        return Path(store.get(key).decode())
    if "LOCAL_RANK" in os.environ and ENVIRONMENT in os.environ:  # started by Lightning
        return Path(os.environ[ENVIRONMENT])
    run = make_run(runs_dir, name)
    os.environ[ENVIRONMENT] = str(run)
    return run


def make_run(runs_dir: str, name: str) -> Path:
    """Makes a folder that no other run has."""
    if Path(name).name != name:
        raise UserError(f"--name {name} is no name for a folder: give one without slashes")
    time = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
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
    checkpoints = list((Path(runs_dir).absolute() / name).glob("*/checkpoints/*.ckpt"))
    if not checkpoints:
        raise UserError(
            f"there is no checkpoint to go on from: no {runs_dir}/{name}/*/checkpoints/last.ckpt; start without "
            "--ckpt_path, or name a checkpoint file"
        )
    newest = max(checkpoints, key=lambda path: path.stat().st_mtime).parent
    own = sorted(newest.glob("*.ckpt"), key=lambda path: (path.name == "last.ckpt", path.stat().st_mtime), reverse=True)
    errors = []
    for checkpoint in own:
        try:
            step = load_checkpoint(checkpoint)["global_step"]
        except UserError as error:
            errors.append(error)
        else:
            if errors:
                print(f"{errors[0]}: going on from {checkpoint.name} of step {step}")
            return checkpoint
    raise errors[0]


def run_of(checkpoint: Path) -> Optional[Path]:
    """The run folder that a checkpoint lies in, None if it lies elsewhere."""
    run = checkpoint.absolute().parent.parent
    return run if (run / "config.yaml").is_file() else None


def ended_early(run: Path, checkpoint: Path) -> bool:
    """Whether a run that goes on from its own last checkpoint was ended before it had made its model."""
    return checkpoint.absolute().parent.parent == run.absolute() and not (run / "model").exists()


def load_checkpoint(path: Path) -> dict:
    """Loads a checkpoint, whose tensors stay on disk until they are used.

    Raises:
        UserError: Names the file and what is wrong with it.
    """
    import torch

    if not path.is_file():
        raise UserError(f"there is no checkpoint file {path}")
    remedy = f"take another one of {path.parent}"
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch.load does not compare the sums
        checkpoint = None if damaged else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of damaged files, zipfile and pickle raise whatever they stumble over
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the checkpoint {path} ({path.stat().st_size:,} bytes) is cut short, damaged or none ({reason}): {remedy}"
        ) from error
    if damaged:
        raise UserError(f"the checkpoint {path} is damaged (the checksum of its part {damaged} is wrong): {remedy}")
    if not isinstance(checkpoint, dict) or not {"network", "state_dict", "global_step"} <= checkpoint.keys():
        raise UserError(f"{path} is no checkpoint of lm_lightning: {remedy}")
    return checkpoint


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
