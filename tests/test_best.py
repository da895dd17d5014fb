"""The best checkpoint: which file it is, in which direction it is the best, and that `model/` has its weights."""

import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from conftest import command
from lightning.pytorch import Callback, LightningModule, Trainer
from test_survival import (
    CONSTANT,
    DDP,
    SHARDED,  # fork: sharding
    logged,
    names,
    only,
)

from lm_lightning.checkpoints.loading import CheckpointFolder, load_checkpoint
from lm_lightning.errors import UserError
from lm_lightning.models.export import generation_config
from lm_lightning.security.trust import PACKAGES


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
    own, saved = weights_of(folder), load_checkpoint(checkpoint)["state_dict"]
    return all(torch.equal(tensor, saved[f"network.{name}"][: len(tensor)]) for name, tensor in own.items())


def about(run: Path) -> dict:
    return json.loads((run / "model" / "training.json").read_text())


def lowest(run: Path) -> int:
    losses = logged(run, "val/loss")
    return min(losses, key=lambda step: losses[step])


@pytest.mark.parametrize("plugins", [(), ("--trainer.plugins", "BackgroundCheckpoints")])
@pytest.mark.slow
def test_the_best_of_several_checkpoints_is_found_after_a_resume_and_a_move(
    fit, cli, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugins: tuple
):
    monkeypatch.setenv(PACKAGES, "test_best")  # so that the run's own config may import Spoil
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
    assert CheckpointFolder(run / "checkpoints").best_path() == best and holds(run / "model", best)
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
        assert f"weights: {best}" in out


@pytest.mark.slow
def test_model_holds_the_last_step_if_asked_and_every_checkpoint_is_kept_if_asked(fit, cli):
    every = ("--last.save_top_k", -1, "--last.every_n_train_steps", 4, "--best.save_top_k", -1)
    run = fit(*SPOILED, "--export", "last", *every)
    losses = logged(run, "val/loss")
    files = {f"best-{step}-{loss:.4f}.ckpt" for step, loss in losses.items()}
    assert names(run) == files | {f"last-{step}.ckpt" for step in (4, 8, 12, 16, 20, 24)} | {"last.ckpt"}
    assert holds(run / "model", run / "checkpoints" / "last.ckpt")
    assert about(run) == {"checkpoint": "last", "step": 24}
    best = CheckpointFolder(run / "checkpoints").best_path()
    assert load_checkpoint(best)["global_step"] == lowest(run) < 24
    (run / "checkpoints" / "last.ckpt").unlink()  # as a kill leaves it
    assert CheckpointFolder(run / "checkpoints").newest_first()[0].name in (
        "last-24.ckpt",
        f"best-24-{losses[24]:.4f}.ckpt",
    )
    cli("export", run)
    assert about(run)["step"] == 24


def test_without_a_best_checkpoint_the_last_step_is_exported(fit):
    run = fit(*SPOILED, "--best.save_top_k", 0)
    assert names(run) == {"last.ckpt"} and about(run) == {"checkpoint": "last", "step": 24}


@pytest.mark.slow
def test_the_last_step_is_validated_unless_validation_is_off(fit):
    """Also if it is amid an epoch, amid an interval, or if the time or patience was over."""
    run = fit("--trainer.max_steps", 7, "--trainer.accumulate_grad_batches", 2, "--trainer.val_check_interval", 5)
    assert sorted(logged(run, "val/loss")) == [5, 7] and about(run)["step"] in (5, 7)
    assert load_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 7
    epochs = ("--trainer.max_steps", -1, "--trainer.max_epochs", 3, "--trainer.limit_train_batches", 2)
    run = fit(*epochs, "--trainer.check_val_every_n_epoch", 2, "--trainer.val_check_interval", 1.0)
    assert sorted(logged(run, "val/loss")) == [4, 6]
    run = fit("--trainer.max_steps", 3, "--trainer.limit_val_batches", 0)
    with open(run / "metrics.csv") as file:
        assert "val/loss" not in file.read()
    assert about(run) == {"checkpoint": "last", "step": 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(DDP, id="ddp"),
        pytest.param(SHARDED, id="sharded"),  # fork: sharding
    ],
)
def test_several_processes_export_the_best(recipe: Path, strategy: tuple):
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    flags = (*SPOILED, "--best.save_top_k", 2, *strategy)
    result = command("fit", "--config", recipe, *flags, env=os.environ | {"PYTHONPATH": path})
    assert result.returncode == 0, result.stderr
    run = only(recipe.parent / "runs" / "tiny")
    best = CheckpointFolder(run / "checkpoints").best_path()
    assert load_checkpoint(best)["global_step"] == about(run)["step"] == lowest(run) < 13
    assert holds(run / "model", best)


@pytest.mark.slow
def test_the_direction_is_that_of_the_metric(fit, capsys):
    stop = ("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor")
    run = fit("--trainer.max_steps", 3, *stop, "val/perplexity", "--best.monitor", "train/tokens_per_second")
    states = load_checkpoint(run / "checkpoints" / "last.ckpt")["callbacks"]
    assert "EarlyStopping{'monitor': 'val/perplexity', 'mode': 'min'}" in states
    assert any(key.startswith("Checkpoints{'monitor': 'train/tokens_per_second', 'mode': 'max'") for key in states)
    for flags, reason in (
        (("--best.mode", "max"), "best.mode is max, but val/loss is better the lower it is"),
        ((*stop, "val/loss", "--trainer.callbacks.mode", "max"), "EarlyStopping.mode is max, but val/loss"),
        (("--best.monitor", "val_loss"), "does not log: choose one of train/loss.*val/loss, val/perplexity, val/bits"),
        ((*stop, "val/accuracy"), "EarlyStopping.monitor is val/accuracy, which this run does not log"),
    ):
        with pytest.raises(UserError, match=reason):
            fit(*flags)


@pytest.mark.slow
def test_what_cannot_be_exported_is_repaired_or_refused_before_training(fit, tmp_path: Path):
    base = fit("--trainer.max_steps", 3) / "model"
    settings = json.loads((base / "generation_config.json").read_text())
    contradictory = {"do_sample": False, "temperature": 0.7, "top_p": 0.9, "length_penalty": 2.0, "num_beams": 1}
    (base / "generation_config.json").write_text(json.dumps(settings | contradictory))
    tune = ("--model.network", "null", "--model.pretrained", base, "--data.tokenizer.path", base)
    run = fit(*tune, "--trainer.max_steps", 3, *CONSTANT)
    written = transformers.GenerationConfig.from_pretrained(run / "model").to_diff_dict()
    assert not {"temperature", "top_p", "length_penalty"} & written.keys()
    assert written["eos_token_id"] == settings["eos_token_id"]

    before = set((tmp_path / "runs" / "tiny").iterdir())
    blocked = tmp_path / "blocked"
    shutil.copytree(run, blocked / "tiny" / run.name)
    shutil.rmtree(blocked / "tiny" / run.name / "model")
    (blocked / "tiny" / run.name / "model").write_text("a file is in the way")
    flags = (*tune, "--trainer.max_steps", 4, "--ckpt_path", blocked / "tiny" / run.name / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match="model, which is written at the end of the run, is not writable"):
        fit(*flags, *CONSTANT)
    assert set((tmp_path / "runs" / "tiny").iterdir()) == before


def test_generation_settings_that_transformers_refuses_are_removed_and_named():
    config, removed = generation_config(
        {"do_sample": False, "temperature": 0.7, "eos_token_id": 3, "max_new_tokens": 9}
    )
    assert removed == ["temperature 0.7"]
    assert config.to_diff_dict().items() >= {"eos_token_id": 3, "max_new_tokens": 9}.items()
    assert generation_config({"max_new_tokens": -1, "pad_token_id": 2})[1] == ["max_new_tokens -1"]
