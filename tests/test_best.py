"""The best checkpoint: which file it is, in which direction it is the best, and that `model/` has its weights."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from test_survival import CONSTANT, logged, names

from lm_lightning import run as runs


class Spoil(Callback):
    """Makes a network worse with each step from one on, as overfitting would."""

    def __init__(self, start: int) -> None:
        self.start = start

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if trainer.global_step >= self.start:
            with torch.no_grad():
                for parameter in pl_module.network.parameters():
                    parameter.mul_(1.5)


SPOILED = (  # validated at 3, 6, ..., 24, the best of them is one of the first four
    *(*CONSTANT, "--trainer.max_steps", 24, "--trainer.val_check_interval", 3),
    *("--trainer.callbacks+=test_best.Spoil", "--trainer.callbacks.start", 13),
)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def holds(folder: Path, checkpoint: Path) -> bool:
    """Whether a `from_pretrained` folder has the weights of a checkpoint."""
    own, saved = weights_of(folder), runs.load_checkpoint(checkpoint)["state_dict"]
    return all(torch.equal(tensor, saved[f"network.{name}"][: len(tensor)]) for name, tensor in own.items())


def about(run: Path) -> dict:
    return json.loads((run / "model" / "training.json").read_text())


def lowest(run: Path) -> int:
    losses = logged(run, "val/loss")
    return min(losses, key=lambda step: losses[step])


@pytest.mark.parametrize("plugins", [(), ("--trainer.plugins", "BackgroundCheckpoints")])
def test_the_best_of_several_checkpoints_is_found_after_a_resume_and_a_move(
    fit, cli, recipe: Path, tmp_path: Path, plugins: tuple
):
    flags = (*SPOILED, "--best.save_top_k", 3, *plugins)
    run = fit(*flags, "--trainer.max_steps", 9)
    moved = tmp_path / "moved"
    (tmp_path / "runs").rename(moved)
    run = fit(*flags, "--runs_dir", moved, "--ckpt_path", "last")
    losses = logged(run, "val/loss")
    assert sorted(losses) == [3, 6, 9, 12, 15, 18, 21, 24]
    ranked = sorted(losses, key=lambda step: losses[step])
    assert ranked[0] < 13
    files = {f"best-{step}-{losses[step]:.4f}.ckpt" for step in ranked[:3]}
    assert names(run) == files | {"last.ckpt"}
    best = run / "checkpoints" / f"best-{ranked[0]}-{losses[ranked[0]]:.4f}.ckpt"
    assert runs.best_checkpoint(run / "checkpoints") == best and holds(run / "model", best)
    assert about(run) == {
        "checkpoint": "best",
        "step": ranked[0],
        "metric": "val/loss",
        "score": pytest.approx(losses[ranked[0]]),
    }
    if plugins:
        return
    shutil.copytree(run, tmp_path / "copy")  # as another machine has it
    for flags, file in (((), best), (("--checkpoint", "best"), best), (("--checkpoint", "last"), None)):
        shutil.rmtree(run)
        cli("export", tmp_path / "copy", *flags, "--output", run)
        assert holds(run, tmp_path / "copy" / "checkpoints" / (file.name if file else "last.ckpt"))
        shutil.rmtree(run), shutil.copytree(tmp_path / "copy", run)
    for path in ("best", run / "checkpoints" / "best.ckpt"):
        out = cli("validate", "--config", recipe, "--runs_dir", moved, "--ckpt_path", path)
        assert f"checkpoint: {best}" in out
