"""Finds the checkpoints of runs, by a path or by the words `last` and `best`, verifies them and loads them."""

import contextlib
import functools
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional, Protocol

import torch

from lm_lightning import features
from lm_lightning.checkpoints.files import OLD
from lm_lightning.errors import UserError, one_line
from lm_lightning.run import experiment_folder
from lm_lightning.security import untrusted

KINDS = ("*.ckpt", f"*.ckpt{OLD}")


class Checkpoint(NamedTuple):
    """A checkpoint whose checksums were verified.

    `content` is its content, without tensors if it is a folder. The tensors of a file stay on disk until they are used.
    """

    path: Path
    content: dict[str, Any]


class CheckpointFormat(Protocol):
    """What a module of `Feature.checkpoint_folders` defines: how checkpoints that are folders are read."""

    def is_checkpoint(self, path: Path) -> bool:
        """Whether a folder is one of these checkpoints."""

    def gather(self, path: Path) -> dict[str, Any]:
        """A checkpoint as it would be in a file, with full tensors."""

    def meta(self, path: Path) -> dict[str, Any]:
        """All but the tensors of a checkpoint."""

    def damaged(self, path: Path) -> Optional[str]:
        """The name of a file of a checkpoint that is not as it was written, None if all are."""


def folder_format(path: Path) -> Optional[CheckpointFormat]:
    """How a checkpoint that is a folder is read, None if it is none."""
    if not path.is_dir():
        return None
    return next((found for found in features.checkpoint_folders() if found.is_checkpoint(path)), None)


def load_checkpoint(path: Path, weights: bool = True, verified: bool = False) -> dict[str, Any]:
    """Loads a checkpoint: a file, whose tensors stay on disk until they are used, or a folder.

    Args:
        path: The file or folder.
        weights: Whether to read and assemble the tensors of a sharded folder.
        verified: Whether its checksums have already been verified.

    Raises:
        UserError: If it cannot be loaded; names the file and the problem.
    """
    if not exists(path):
        raise UserError(f"there is no checkpoint file {path}")
    if not verified:
        verify(path)
    with readable(path):
        if folder := folder_format(path):
            return folder.gather(path) if weights else folder.meta(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    complete = isinstance(checkpoint, dict) and {"network", "state_dict", "global_step"} <= checkpoint.keys()
    if not complete or type(checkpoint["global_step"]) is not int:
        raise UserError(f"{path} is not a checkpoint of lm_lightning: {remedy(path)}")
    return checkpoint


def exists(path: Path) -> bool:
    """Whether a path is a checkpoint: a file or a folder."""
    return path.is_file() or folder_format(path) is not None


def verify(path: Path) -> None:
    """Verifies the checksums of a checkpoint.

    Raises:
        UserError: If a part of it has changed since it was written.
    """
    with readable(path):
        if folder := folder_format(path):
            damaged = folder.damaged(path)
        else:
            with zipfile.ZipFile(path) as file:
                untrusted.refuse_expanding_zip(file, path)
                damaged = file.testzip()  # torch.load does not verify checksums
        if damaged:
            raise UserError(
                f"the checkpoint {path} is damaged (the checksum of its part {damaged} is wrong): {remedy(path)}"
            )


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Converts any error in the block to a UserError that names the checkpoint."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # zipfile and pickle raise any type of error for damaged files
        size = f" ({path.stat().st_size:,} bytes)" if path.is_file() else ""
        reason = one_line(error, 200)
        raise UserError(
            f"the checkpoint {path}{size} is cut short, damaged, or not a checkpoint ({reason}): {remedy(path)}"
        ) from error


def remedy(path: Path) -> str:
    """What the user can do if a checkpoint cannot be used."""
    if any(other != path for kind in KINDS for other in path.parent.glob(kind)):
        return f"use another one in {path.parent}"
    return f"{path.parent} has no other one, so start a new run"


class CheckpointFolder:
    """The checkpoints in `checkpoints/` of a run. Each is read only once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @functools.cached_property
    def contents(self) -> dict[Path, dict[str, Any]]:
        """The contents of all readable checkpoints, by path; not verified, and without the tensors of folders."""
        found = {}
        for path in self.paths:
            with contextlib.suppress(UserError):
                found[path] = load_checkpoint(path, weights=False, verified=True)
        return found

    @functools.cached_property
    def paths(self) -> list[Path]:
        """The paths of all checkpoints, unsorted."""
        return [path for kind in KINDS for path in self.folder.glob(kind)]

    def newest_first(self) -> list[Path]:
        """The paths of all checkpoints, the latest step first; unreadable ones come last, except for `last.ckpt`."""

        def order(path: Path) -> tuple:
            last = path.name == "last.ckpt"
            unknown = float("inf") if last else -1.0
            step = float(self.contents[path]["global_step"]) if path in self.contents else unknown
            return step, last, path.stat().st_mtime

        return sorted(self.paths, key=order, reverse=True)

    def newest(self) -> Checkpoint:
        """The checkpoint of the latest step that is not damaged.

        Raises:
            UserError: If there is none.
        """
        errors = []
        for path in self.newest_first():
            try:
                checkpoint = self.verified(path)
            except UserError as error:
                errors.append(error)
            else:
                if errors:
                    print(f"{errors[0]}: using {path.name} of step {checkpoint.content['global_step']}")
                return checkpoint
        if not errors:
            raise UserError(f"there is no checkpoint in {self.folder}")
        if len(errors) == 1:
            raise errors[0]
        reason = str(errors[0]).rpartition(": ")[0]  # without its remedy, which is to use another checkpoint
        raise UserError(
            f"none of the {len(errors)} checkpoints in {self.folder} can be used ({reason}): start a new run"
        )

    def verified(self, path: Path) -> Checkpoint:
        """The checkpoint with this path.

        Raises:
            UserError: If it is missing or damaged.
        """
        if path not in self.contents:
            return Checkpoint(path, load_checkpoint(path, weights=False))  # explains the error
        verify(path)
        return Checkpoint(path, self.contents[path])

    def best_path(self) -> Path:
        """The file that the newest checkpoint has recorded as the best by `best.monitor`.

        Raises:
            UserError: If there is none.
        """
        for path in self.newest_first():
            for state in self.contents.get(path, {}).get("callbacks", {}).values():
                if isinstance(state, dict) and state.get("monitor") and state.get("best_model_score") is not None:
                    if os.path.dirname(state["best_model_path"]) != str(state["dirpath"]):
                        continue  # belongs to the run from which this one was started
                    best = self.folder / os.path.basename(state["best_model_path"])
                    if best.exists():
                        return best
                    raise UserError(f"the best checkpoint {best} is missing: use another one in {self.folder}")
        raise UserError(
            f"there is no best checkpoint in {self.folder}, as no metric was monitored (best.monitor, "
            "best.save_top_k) or no validation was run: use --ckpt_path last"
        )

    def exported(self) -> Checkpoint:
        """The checkpoint that the end of training exports, or would export if training ended now.

        Raises:
            UserError: If there is none, or it is damaged.
        """
        newest = next(iter(self.newest_first()), self.folder / "last.ckpt")
        settings = self.contents.get(newest, {}).get("export", {"weights": "last"})
        if settings["weights"] == "last":
            return self.verified(newest)
        try:
            best = self.best_path()
        except UserError:  # no metric is monitored
            return self.verified(newest)
        complete = best in self.contents and self.contents[best]["global_step"] >= settings["complete_from"]
        return self.verified(best if complete else newest)

    def named(self, name: str) -> Checkpoint:
        """The checkpoint with a name: `best`, `last` or the name of a file.

        Raises:
            UserError: If it is missing or damaged.
        """
        stem = name.removesuffix(".ckpt")
        if stem == "last":
            return self.newest()
        return self.verified(self.best_path() if stem == "best" else self.folder / f"{stem}.ckpt")


def find_checkpoint(given: str, folder: Path) -> Checkpoint:
    """Finds the checkpoint that a user specified.

    Args:
        given: A path, `last` (the newest one that is not damaged), `best`, or the name of another file in `folder`.
            The paths of `best.ckpt` and `last.ckpt` are accepted even if these checkpoints have other file names.
        folder: `checkpoints/` of the run.

    Raises:
        UserError: If it is missing or damaged.
    """
    path = Path(given).expanduser()
    if is_checkpoint_name(given):
        return CheckpointFolder(folder).named(given)
    if not exists(path) and path.stem in ("last", "best"):
        return CheckpointFolder(path.parent).named(path.name)
    return Checkpoint(path, load_checkpoint(path, weights=False))


def is_checkpoint_name(given: str) -> bool:
    """Whether a checkpoint is given as `last`, `best` or the name of a file, not as a path."""
    path = Path(given).expanduser()
    return given in ("last", "best") or not (exists(path) or len(path.parts) > 1)


def checkpoint_folder(given: str, runs_dir: str, name: str) -> Path:
    """The folder of a checkpoint that is given as a path, or as a name in the newest run of an experiment.

    Raises:
        UserError: If the experiment has no run with a checkpoint.
    """
    return newest_folder(runs_dir, name) if is_checkpoint_name(given) else Path(given).expanduser().parent


def newest_folder(runs_dir: str, name: str) -> Path:
    """`checkpoints/` of the newest run of an experiment that has a checkpoint.

    Raises:
        UserError: If no run has one.
    """
    checkpoints = [path for kind in KINDS for path in experiment_folder(runs_dir, name).glob(f"*/checkpoints/{kind}")]
    if not checkpoints:
        raise UserError(
            f"there is no checkpoint to resume from: no {runs_dir}/{name}/*/checkpoints/last.ckpt; start without "
            "--ckpt_path, or give the path of a checkpoint"
        )
    # A job that SLURM has requeued resumes its own run, even if there are newer runs of this name.
    job = f"slurm-{os.environ.get('SLURM_JOB_ID')}-"
    checkpoints = [path for path in checkpoints if path.parent.parent.name.startswith(job)] or checkpoints
    return max(checkpoints, key=lambda path: path.stat().st_mtime).parent


def run_of(checkpoint: Path) -> Optional[Path]:
    """The run folder that contains a checkpoint; None if it is not in a run folder."""
    run = checkpoint.absolute().parent.parent
    return run if (run / "config.yaml").is_file() else None
