"""Resuming from every checkpoint that a run writes: the same steps, weights and metrics as without the interruption."""

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_fit import same, weights

from lm_lightning.checkpoints.loading import load_checkpoint
from lm_lightning.checkpoints.plugins import CheckpointFiles
from lm_lightning.errors import UserError

LOGGER = {"class_path": "lm_lightning.callbacks.metrics_file.MetricsFile", "init_args": {"save_dir": "<run>"}}
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
    "in the epoch": ("--trainer.val_check_interval", 1, "--trainer.check_val_every_n_epoch", 1),
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


# Each validation with an end by steps and one by epochs, and each of both with and without accumulation
QUICK = [
    ("steps first", "at its end", 1),
    ("epochs first", "across epochs", 2),
    ("steps", "in the epoch", 2),
]
CELLS = [
    *QUICK,
    *(
        pytest.param(*cell, marks=pytest.mark.slow)
        for cell in (
            ("epochs", "in the epoch", 1),
            ("time", "in the epoch", 2),
            ("epochs", "at its end", 2),
            ("steps", "every second epoch", 2),
            ("epochs", "every second epoch", 1),
            ("steps first", "across epochs", 1),
            ("steps", "never", 2),
            ("epochs first", "never", 1),
        )
    ),
]


@pytest.mark.parametrize(("end", "validation", "accumulate"), CELLS)
def test_a_run_resumes_exactly_from_every_checkpoint(
    fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, validation: str, accumulate: int
):
    flags = (*TINY, *ENDS[end], *VALIDATIONS[validation], "--trainer.accumulate_grad_batches", accumulate)
    flags = (*flags, "--trainer.limit_train_batches", EPOCH, "--last.every_n_train_steps", 1, "--best.save_top_k", -1)
    with monkeypatch.context() as patch:
        kept = snapshots(patch, tmp_path / "kept")
        whole = fit(*flags)
    steps = 4 if end in ("steps", "steps first") or accumulate == 2 else 6
    assert load_checkpoint(whole / "checkpoints" / "last.ckpt")["global_step"] == steps
    assert len(kept) >= steps
    for run in kept:
        checkpoint = run / "checkpoints" / "last.ckpt"
        before = load_checkpoint(checkpoint, weights=False)
        place = f"step {before['global_step']}, {before['loops']['fit_loop']['epoch_loop.batch_progress']['current']}"
        fit(*flags, "--ckpt_path", checkpoint)
        assert load_checkpoint(checkpoint)["global_step"] == steps, place
        assert rows(run) == rows(whole), place
        assert same(weights(run), weights(whole)), place


def losses(run: Path) -> list[float]:
    return [float(row["train/loss"]) for row in rows(run) if row["train/loss"]]


@pytest.mark.parametrize(
    "own",
    [("--trainer.precision", "bf16-mixed"), ("--model.optimizer", "lm_lightning.optim.MuonAdamW")],
    ids=["bf16", "Muon"],
)
def test_a_run_in_bf16_or_with_muon_resumes_exactly(fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: tuple):
    flags = (*TINY, *own, *ENDS["steps"], "--trainer.limit_val_batches", 0, "--last.every_n_train_steps", 2)
    with monkeypatch.context() as patch:
        kept = snapshots(patch, tmp_path / "kept")
        whole = fit(*flags)
    checkpoint = kept[0] / "checkpoints" / "last.ckpt"
    assert load_checkpoint(checkpoint)["global_step"] == 2
    fit(*flags, "--ckpt_path", checkpoint)
    assert rows(kept[0]) == rows(whole) and same(weights(kept[0]), weights(whole))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_schedule_of_epochs_is_as_long_as_one_of_the_same_steps(fit, accumulate: int):
    flags = (*TINY, "--model.schedule.shape", "linear", "--model.schedule.warmup_steps", 1)
    flags = (*flags, "--trainer.limit_train_batches", EPOCH, "--trainer.accumulate_grad_batches", accumulate)
    flags = (*flags, "--trainer.log_every_n_steps", 1)
    epochs, steps = (fit(*flags, *ENDS["epochs"]), fit(*flags, "--trainer.max_steps", 4 if accumulate == 2 else 6))
    rates = [[row["train/learning_rate"] for row in rows(run) if row["train/learning_rate"]] for run in (epochs, steps)]
    assert rates[0] == rates[1] and len({*rates[0]}) == len(rates[0]) == (4 if accumulate == 2 else 6)


@pytest.mark.slow
def test_a_run_that_ends_within_its_epoch_ends_well_and_continues_there(fit, capsys):
    flags = (*TINY, "--trainer.log_every_n_steps", 1, "--trainer.val_check_interval", 1.0)
    flags = (*flags, "--trainer.check_val_every_n_epoch", 1, "--trainer.limit_train_batches", 5)
    whole = fit(*flags, "--name", "whole", "--trainer.max_steps", 8)
    cut = fit(*flags, "--name", "cut", "--trainer.max_steps", 3)  # two steps before the first validation
    assert (cut / "model").is_dir() and [row["step"] for row in rows(cut) if row["val/loss"]] == ["3"]
    assert fit(*flags, "--name", "cut", "--trainer.max_steps", 8, "--ckpt_path", "last") == cut
    assert same(weights(whole), weights(cut)) and losses(whole) == losses(cut)
    assert [row["step"] for row in rows(cut) if row["val/loss"]] == ["3", "5", "8"]


def test_tokens_are_counted_at_every_step_even_if_the_last_of_an_epoch_is_short(fit):
    flags = ("--trainer.log_every_n_steps", 1, "--trainer.limit_train_batches", 3, "--trainer.max_steps", 4)
    run = fit(*TINY, *flags, "--trainer.accumulate_grad_batches", 2)
    tokens = {row["step"]: row["train/tokens"] for row in rows(run) if row["train/loss"]}
    assert tokens == {"1": "32.0", "2": "48.0", "3": "80.0", "4": "96.0"}  # batches of 2 blocks of 8 tokens


def test_the_same_epochs_with_other_micro_batches_are_continued(fit):
    """Half an epoch with micro-batches of four blocks, then the rest with micro-batches of two, two in a step."""
    flags = (*TINY, "--trainer.max_epochs", 1, "--trainer.limit_val_batches", 0, "--trainer.limit_train_batches")
    part = fit(*flags, 8, "--data.batch_size", 4, "--trainer.max_steps", 4)
    other = ("--data.batch_size", 2, "--trainer.accumulate_grad_batches", 2, "--trainer.max_steps", 100)
    assert fit(*flags, 16, *other, "--ckpt_path", "last") == part
    assert load_checkpoint(part / "checkpoints" / "last.ckpt")["global_step"] == 8


# Why a run has ended


def said(out: str) -> str:
    (line,) = (line for line in out.splitlines() if line.startswith(("finished", "stopped")))
    return line


STOPPING = json.dumps(
    [{"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss", "patience": 2, "min_delta": 100.0}}]
)


@pytest.mark.slow
def test_a_run_that_was_stopped_early_says_so_and_continues_only_if_it_is_asked_to(fit, cli, recipe: Path):
    flags = ("fit", "--config", recipe, *TINY, "--trainer.val_check_interval", 1, "--trainer.callbacks")
    out = cli(*flags, STOPPING)  # the first validation sets the best value, the second and third do not reach it
    assert said(out).startswith("stopped early: val/loss did not improve for 2 validations; its best was")
    assert said(out).endswith("(step 3)")
    run = Path(out.split("run folder: ")[1].splitlines()[0])
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match="step 3, where val/loss stopped this run early: raise the patience"):
        cli(*flags, STOPPING, "--ckpt_path", "last")
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()} == before
    more = cli(*flags, STOPPING.replace('"patience": 2', '"patience": 4'), "--ckpt_path", "last")
    assert "did not improve for 4 validations" in said(more) and said(more).endswith("(step 5)")
    shutil.rmtree(run / "model")  # as if it was killed before
    assert "(step 5)" in said(cli(*flags, STOPPING, "--ckpt_path", "last")) and (run / "model").is_dir()


def test_early_stopping_does_not_look_for_a_metric_that_is_not_there_yet(fit):
    flags = ("--trainer.val_check_interval", 1.0, "--trainer.check_val_every_n_epoch", 1, "--trainer.max_steps", 3)
    run = fit(*TINY, *flags, "--trainer.limit_train_batches", 4, "--trainer.callbacks", STOPPING)
    assert load_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 3


@pytest.mark.slow
def test_a_run_names_the_limit_that_has_ended_it(cli, recipe: Path):
    flags = ("fit", "--config", recipe, *TINY, "--name")
    assert said(cli(*flags, "a", "--trainer.max_steps", 3)) == "finished: reached trainer.max_steps 3 (step 3)"
    epochs = ("--trainer.max_steps", -1, "--trainer.max_epochs", 2, "--trainer.limit_train_batches", 2)
    assert said(cli(*flags, "b", *epochs)) == "finished: reached trainer.max_epochs 2 (step 4)"
    with pytest.raises(UserError, match="step 4, where trainer.max_epochs 2 ended this run: raise trainer.max_epochs"):
        cli(*flags, "b", *epochs, "--ckpt_path", "last")
    time = ("--trainer.max_steps", -1, "--trainer.max_time", "00:00:00:01", "--trainer.log_every_n_steps", 1)
    output = cli(*flags, "c", *time, "--trainer.enable_progress_bar", "true")
    assert said(output).startswith("stopped: reached trainer.max_time 0:00:01 (step ")
    shown = [list(map(int, numbers)) for numbers in re.findall(r"^train (\d+)/(\d+) \d+%, 00:0", output, re.M)]
    assert len(shown) > 1 and all(step <= steps < 10_000 for step, steps in shown)  # the steps that the time allows
    with pytest.raises(UserError, match="where trainer.max_time 0:00:01 ended this run: raise trainer.max_time"):
        cli(*flags, "c", *time, "--ckpt_path", "last")


# What Lightning offers for debugging


def test_overfitting_repeats_the_same_batches_and_resumes_within_them(fit):
    flags = (*TINY, "--trainer.overfit_batches", 3, "--trainer.log_every_n_steps", 1, "--model.optimizer.lr", 0)
    flags = (*flags, *(f"--model.network.{name}_pdrop=0" for name in ("resid", "embd", "attn")))
    run = fit(*flags, "--trainer.max_steps", 4)
    assert fit(*flags, "--trainer.max_steps", 9, "--ckpt_path", "last") == run
    found = losses(run)
    assert found[:3] == found[3:6] == found[6:] and len(set(found)) == 3


@pytest.mark.parametrize("flags", [("--trainer.fast_dev_run", "true"), ("--trainer.fast_dev_run", 2)])
def test_a_trial_run_of_some_batches_leaves_nothing_behind(cli, recipe: Path, flags: tuple):
    out = cli("fit", "--config", recipe, *TINY, *flags, "--trainer.accumulate_grad_batches", 2)
    assert said(out).startswith("finished: trainer.fast_dev_run")
    run = Path(out.split("run folder: ")[1].splitlines()[0])
    assert not (run / "model").exists() and not (run / "checkpoints").exists() and not (run / "metrics.csv").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--trainer.check_val_every_n_epoch", 0), "check_val_every_n_epoch is 0, but must be 1 or more, or null"),
        (("--trainer.max_epochs", 0), "trainer.max_epochs is 0, but must be 1 or more"),
        (("--trainer.limit_train_batches", 0), "trainer.limit_train_batches is 0"),
        (("--trainer.val_check_interval", 0), "trainer.val_check_interval is 0"),
        (("--trainer.overfit_batches", 0.0001), "overfit_batches|requested to check 0.0001"),
        (
            ("--trainer.val_check_interval", 100, "--trainer.check_val_every_n_epoch", 1)
            + ("--trainer.limit_train_batches", 10),
            "must be less than or equal to the number of the training batches .10.*check_val_every_n_epoch=None",
        ),
    ],
)
def test_limits_that_lightning_fails_at_are_refused_in_a_sentence(fit, flags: tuple, message: str):
    with pytest.raises(UserError, match=message):
        fit(*flags)


def test_slurm_without_srun_is_refused_in_a_sentence(fit, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    with pytest.raises(UserError, match="SLURM_PROCID is not, .*: start it with srun"):
        fit()


def test_validation_intervals_are_optimizer_steps(fit):
    run = fit(*TINY, "--trainer.accumulate_grad_batches", 3, "--trainer.val_check_interval", 2)
    assert [row["step"] for row in rows(run) if row["val/loss"]] == ["2", "4", "6", "8", "10"]
    assert "  val_check_interval: 2\n" in (run / "config.yaml").read_text()
