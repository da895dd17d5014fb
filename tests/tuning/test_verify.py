"""verify: what is equal passes, what is not is found, and what cannot be run says why."""

import os
from pathlib import Path

import pytest
from conftest import ROOT, needs
from lightning.pytorch import Callback, LightningModule, Trainer

from lm_lightning.errors import UserError
from lm_lightning.tuning import verify
from lm_lightning.tuning.variants import VARIANTS, Outcome, skip_reason


class Sabotage(Callback):
    """Spoils the gradients of two processes by half a percent, and ends runs that accumulate."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if trainer.accumulate_grad_batches == 2:
            raise UserError("micro-batches are not liked here")
        if trainer.world_size == 2:
            for parameter in pl_module.parameters():
                parameter.grad.mul_(1.005)


def rows(text: str) -> dict[str, list[str]]:
    """The cells of the table by its variants."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert len({len(row) for row in cells}) == 1
    return {row[0]: row[1:] for row in cells[2:]}


@pytest.mark.slow
def test_ways_that_are_equal_are_within_tolerance(cli, recipe: Path, tmp_path: Path):
    """Although the recipe has dropout, a warm-up, and its runs elsewhere."""
    out = cli(
        *("verify", "--config", recipe, "--model.schedule.warmup_steps", 1000),
        *("--only", "accumulate,documents", "--steps", 3, "--output", tmp_path / "table.md"),
    )
    table = rows(out)
    assert list(table) == ["plain", "accumulate", "documents_eager", "documents"]
    assert [table[name][-1].split()[0] for name in table] == ["base", "within", "base", "within"]
    assert all(float(table[name][-2]) > 0.1 for name in table)  # GiB
    text = (tmp_path / "table.md").read_text()
    assert out.strip() in text and "torch" in text.splitlines()[0]
    assert not (tmp_path / "runs").exists()


def test_wrong_gradient_is_found_and_a_failure_is_a_row(cli, recipe: Path, capsys, monkeypatch):
    path = [str(Path(__file__).parent), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    with pytest.raises(SystemExit) as end:
        cli(
            *("verify", "--config", recipe, "--trainer.callbacks", "test_verify.Sabotage"),
            *("--only", "ddp,accumulate", "--steps", 2),
        )
    assert end.value.code == 1
    out = capsys.readouterr().out
    table = rows(out)
    assert table["ddp"][-1].startswith("OUTSIDE") and float(table["ddp"][2]) == pytest.approx(0.005, rel=0.05)
    assert table["accumulate"][-1] == "failed"
    assert "- accumulate failed: micro-batches are not liked here" in out


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--only", "dpp"), "no variant dpp"),
        (("--steps", "0"), "--steps is 0"),
        (("--steps", "many"), "many"),
        (("--output", "/nowhere/table.md"), "create the folder"),
        (("--ckpt_path", "last"), "cannot resume from --ckpt_path"),
        (("--data.batchsize", "3"), "batchsize"),
        (("--timeout", "0.1"), "not finished after 0.1 seconds"),
    ],
)
def test_mistakes_are_refused_in_one_sentence(recipe: Path, cli, flags: tuple, reason: str):
    with pytest.raises(UserError, match=reason) as refused:
        cli("verify", "--config", recipe, *flags)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "machine", "reason"),
    [
        ("ddp", {"device": "cpu", "gpus": []}, ""),
        ("ddp", {"device": "cuda:0", "gpus": ["H100"]}, "needs 2 GPUs"),
        ("tp_fsdp2", {"device": "cuda:0", "gpus": ["H100"] * 4}, ""),  # fork: sharding
        ("hsdp", {"device": "cuda:0", "gpus": ["H100"] * 4}, "needs 2 nodes"),  # fork: sharding
        ("tp", {"device": "mps:0", "gpus": []}, "needs 2 GPUs"),  # fork: sharding
        ("ddp_accumulate", {"device": "cpu", "gpus": []}, "batch_size 6 is not divisible by 4"),
        pytest.param(
            *("documents_eager", {}, "MaskedData has no mask_documents"),
            marks=needs("tasks.masked_lm"),
        ),
    ],
)
def test_what_cannot_be_run_here_says_why(name: str, machine: dict, reason: str):
    batch_size = 4 if name == "hsdp" else 6
    data = {"class_path": "MaskedData", "init_args": {"batch_size": batch_size}}
    found = skip_reason(VARIANTS[name], data, {"plain": Outcome(environment=machine)})
    assert reason in found and bool(found) == bool(reason)


@pytest.mark.parametrize(("name", "reason"), [("ddp", "Plain has no batch_size"), ("checkpointing", "")])
def test_variants_that_divide_batches_need_a_batch_size(name: str, reason: str):
    data = {"class_path": "own.Plain", "init_args": {}}
    assert skip_reason(VARIANTS[name], data, {"plain": Outcome(environment={"device": "cpu", "gpus": []})}) == reason


def test_interrupted_verify_prints_what_was_finished(monkeypatch, capsys):
    done = Outcome(losses=[1.0], gradient_norms=[2.0], environment={"device": "cpu", "gpus": []})

    def run(name: str, *_: object) -> Outcome:
        if name == "compile":
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(verify, "run_variant", run)
    settings = {"data": {"class_path": "PretrainingData", "init_args": {"batch_size": 8}}}
    monkeypatch.setattr(verify, "shared_settings", lambda *_: settings)
    with pytest.raises(KeyboardInterrupt):
        verify.verify([], steps=1, only=["accumulate", "compile", "checkpointing"])
    table = rows(capsys.readouterr().out)
    assert list(table) == ["plain", "accumulate"] and table["accumulate"][-1].startswith("within")
