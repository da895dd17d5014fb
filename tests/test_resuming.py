"""Resuming from every checkpoint that a run writes: the same steps, weights and metrics as without the interruption."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_fit import same, weights

from lm_lightning import run as runs
from lm_lightning.checkpoints import CheckpointFiles

LOGGER = {"class_path": "lm_lightning.callbacks.tracking.MetricsFile", "init_args": {"save_dir": "<run>"}}
TINY = (
    *("--trainer.logger", json.dumps([LOGGER]), "--trainer.num_sanity_val_steps", 0, "--trainer.limit_val_batches", 1),
    *("--data.batch_size", 2, "--data.block_size", 8, "--model.network.n_layer=1", "--model.network.n_embd=8"),
    *("--trainer.log_every_n_steps", 2, "--model.schedule.shape", "constant", "--trainer.enable_progress_bar", "false"),
)
EPOCH = 3  # micro-batches; two of them in a step make two steps, the second of one
ENDS = {
    "steps": ("--trainer.max_steps", 4, "--trainer.max_epochs", -1),
    "epochs": ("--trainer.max_epochs", 2),
    "steps first": ("--trainer.max_steps", 4, "--trainer.max_epochs", 4),
    "epochs first": ("--trainer.max_steps", 100, "--trainer.max_epochs", 2),
    "time": ("--trainer.max_epochs", 2, "--trainer.max_time", "01:00:00:00"),
}
VALIDATIONS = {
    "in the epoch": ("--trainer.val_check_interval", 2, "--trainer.check_val_every_n_epoch", 1),
    "at its end": ("--trainer.val_check_interval", 1.0, "--trainer.check_val_every_n_epoch", 1),
    "every second epoch": ("--trainer.val_check_interval", 1.0, "--trainer.check_val_every_n_epoch", 2),
    "across epochs": ("--trainer.val_check_interval", 3, "--trainer.check_val_every_n_epoch", "null"),
    "never": ("--trainer.limit_val_batches", 0),
}


def rows(run: Path) -> list[dict[str, str]]:
    """What was logged but for speed and memory."""
    with open(run / "metrics.csv", newline="") as file:
        names = ("epoch", "step", "train/loss", "train/tokens", "train/learning_rate", "val/loss")
        return [{name: row.get(name, "") for name in names} for row in csv.DictReader(file)]


def snapshots(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[Path]:
    """Keeps a copy of the run folder as each checkpoint leaves it, which is what a kill at that moment would leave."""
    found: list[Path] = []
    save = CheckpointFiles.save_checkpoint

    def copying(self: CheckpointFiles, checkpoint: dict, path: Any, **options: Any) -> None:
        save(self, checkpoint, path, **options)
        run = Path(path).parent.parent
        found.append(folder / f"{len(found)}" / "run")
        shutil.copytree(run, found[-1])
        shutil.copy(path, found[-1] / "checkpoints" / "last.ckpt")

    monkeypatch.setattr(CheckpointFiles, "save_checkpoint", copying)
    return found


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("validation", VALIDATIONS)
@pytest.mark.parametrize("end", ENDS)
def test_a_run_resumes_exactly_from_every_checkpoint(
    fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, validation: str, accumulate: int
):
    flags = (*TINY, *ENDS[end], *VALIDATIONS[validation], "--trainer.accumulate_grad_batches", accumulate)
    flags = (*flags, "--trainer.limit_train_batches", EPOCH, "--last.every_n_train_steps", 1, "--best.save_top_k", -1)
    with monkeypatch.context() as patch:
        kept = snapshots(patch, tmp_path / "kept")
        whole = fit(*flags)
    steps = 4 if end in ("steps", "steps first") or accumulate == 2 else 6
    assert runs.load_checkpoint(whole / "checkpoints" / "last.ckpt")["global_step"] == steps
    assert len(kept) >= steps
    for run in kept:
        checkpoint = run / "checkpoints" / "last.ckpt"
        before = runs.load_checkpoint(checkpoint, weights=False)
        place = f"step {before['global_step']}, {before['loops']['fit_loop']['epoch_loop.batch_progress']['current']}"
        fit(*flags, "--ckpt_path", checkpoint)
        assert runs.load_checkpoint(checkpoint)["global_step"] == steps, place
        assert rows(run) == rows(whole), place
        assert same(weights(run), weights(whole)), place
