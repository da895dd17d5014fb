"""Runs that are killed, stopped, short of room, or fed what is not a number."""

import csv
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from conftest import ROOT, command, needs
from forks import python
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from test_fit import metrics, same, weights

from lm_lightning.checkpoints.loading import load_checkpoint, newest_folder
from lm_lightning.checkpoints.plugins import BackgroundCheckpoints, CheckpointFiles
from lm_lightning.cli import saving
from lm_lightning.errors import UserError
from lm_lightning.models.gpt import CausalLM

CONSTANT = ("--model.schedule.shape", "constant")  # so that a run of more steps begins like one of fewer
DDP = ("--trainer.strategy", "ddp", "--trainer.devices", 2, "--data.batch_size", 2)
# fork: sharding
FSDP2 = "lm_lightning.sharding.strategy.FSDP2"
SHARDED = (
    *("--trainer.strategy", FSDP2, "--trainer.strategy.sharded_checkpoints", "true"),
    *("--trainer.devices", 2, "--data.batch_size", 2),
)
TENSOR_PARALLEL = ("--trainer.strategy", "tp", "--trainer.devices", 2)
# fork: end


def callbacks(*chosen: tuple[type, dict]) -> list[str]:
    return [
        "--trainer.callbacks",
        json.dumps([{"class_path": f"test_survival.{c.__name__}", "init_args": a} for c, a in chosen]),
    ]


def only(folder: Path) -> Path:
    (one,) = folder.iterdir()
    return one


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


def logged(run: Path, metric: str) -> dict[int, float]:
    with open(run / "metrics.csv", newline="") as file:
        return {int(row["step"]): float(row[metric]) for row in csv.DictReader(file) if row[metric]}


class Signals(Callback):
    """Sends signals to this process, in the n-th call of a hook."""

    def __init__(self, hook: str, call: int, numbers: list[int], rank: int = 0) -> None:
        self.hook, self.call, self.numbers, self.rank = hook, call, numbers, rank

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_rank == self.rank:
            self.count("train")

    def on_validation_batch_end(self, trainer: Trainer, *_: object) -> None:
        if not trainer.sanity_checking and trainer.global_rank == self.rank:
            self.count("validation")

    def count(self, hook: str) -> None:
        self.call -= hook == self.hook
        if self.call == 0:
            self.call = -1
            for number in self.numbers:
                os.kill(os.getpid(), number)


class Stop(Callback):
    """Ends a run as a failure would, after some micro-batches."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def on_train_batch_end(self, *_: object) -> None:
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("power failure")


class Remembers(Callback):
    """Has a state."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def state_dict(self) -> dict:
        state = {"path": Path("/tmp"), "plain": {"numbers": [1, 2.5, None, True], (0, "a"): torch.ones(2)}}
        return {"state": state[self.kind]}


class Poisoned(CausalLM):
    """A model whose loss is multiplied where the options say so.

    Args:
        steps: Optimizer steps whose last micro-batch is poisoned.
        validations: Validations that are, the first one is 0.
        factor: By what the loss is multiplied.
        rank: The only process that is poisoned.
    """

    def __init__(
        self,
        steps: Optional[list[int]] = None,
        validations: Optional[list[int]] = None,
        factor: float = float("nan"),
        rank: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.poisoned_steps, self.poisoned_validations = steps or [], validations or []
        self.factor, self.rank = factor, rank
        self.validation = -1

    def on_validation_start(self) -> None:
        self.validation += not self.trainer.sanity_checking

    def loss(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        loss, tokens = super().loss(batch)
        poisoned = self.trainer.global_step in self.poisoned_steps and self.global_rank == self.rank
        if poisoned if self.trainer.training else self.validation in self.poisoned_validations:
            loss = loss * self.factor
        return loss, tokens


def poison(**options: object) -> list[object]:
    # (a class that is chosen has none of the recipe's settings)
    network = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64}
    flags: list[object] = ["--model", "test_survival.Poisoned", "--model.network", json.dumps(network)]
    flags += [
        "--model.optimizer",
        "torch.optim.AdamW",
        "--model.optimizer.lr",
        1e-2,
        "--model.schedule.warmup_steps",
        2,
    ]
    for name, value in options.items():
        flags += [f"--model.{name}", value]
    return flags


# Checkpoints


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "own"),
    [
        pytest.param(6, ("--trainer.accumulate_grad_batches", 2), id="one"),
        pytest.param(2, ("--processes", 2, *SHARDED), id="sharded"),  # fork: sharding
    ],
)
def test_killed_at_any_moment_a_run_goes_on_as_if_it_had_not_been(recipe: Path, kills: int, own: tuple):
    script = ROOT / "scripts" / "kill.py"
    flags = ["--trainer.max_steps", "12", "--last.every_n_train_steps", "1", *map(str, own)]
    result = subprocess.run(
        [python("lm_lightning"), script, "--kills", str(kills), "--config", recipe, *flags],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{kills} kills" in result.stdout


def test_a_full_disk_is_told_and_leaves_the_checkpoint_before_and_no_part_of_the_next(tmp_path: Path):
    files, path = CheckpointFiles(), tmp_path / "last.ckpt"
    files.save_checkpoint({"step": 1, "weights": torch.ones(1000)}, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError) as refused:
            files.save_checkpoint({"step": 2, "weights": torch.ones(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    needed = int(str(refused.value).split("it needs ")[1].split(" bytes")[0].replace(",", ""))
    assert 400_000 < needed < 410_000 and str(path) in str(refused.value)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_run_on_a_disk_with_room_for_one_checkpoint_and_a_half_ends_in_one_sentence(fit, tmp_path: Path):
    size = (fit() / "checkpoints" / "last.ckpt").stat().st_size
    disk = tmp_path / "disk"
    disk.mkdir()
    room = str(size * 3 // 2 + 600_000)  # and for tokenizer, metrics and events
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    try:
        (disk / "filler").write_bytes(bytes(600_000 - 250_000))
        with pytest.raises(UserError, match=r"last.ckpt cannot be written \(No space left on device\): it needs"):
            fit("--runs_dir", disk, "--best.save_top_k", 0, "--trainer.max_steps", 100, *CONSTANT)
        run = only(disk / "tiny")
        assert names(run) == {"last.ckpt"}
        assert load_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 5
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_what_a_killed_process_has_left_of_a_checkpoint_is_removed(tmp_path: Path):
    (tmp_path / "epoch=3.ckpt.partial").write_bytes(b"half")
    CheckpointFiles().save_checkpoint({}, tmp_path / "last.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_no_damage_to_a_checkpoint_goes_unnoticed(fit, tmp_path: Path):
    whole = (fit("--trainer.max_steps", 3, "--trainer.limit_val_batches", 0) / "checkpoints" / "last.ckpt").read_bytes()
    file = tmp_path / "x.ckpt"
    file.write_bytes(whole)
    expected = load_checkpoint(file)["state_dict"]
    draw, found = torch.Generator().manual_seed(0), 0
    places = torch.randint(len(whole), (150,), generator=draw).tolist()
    for place in [*places, *range(len(whole) - 30, len(whole))]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        try:
            loaded = load_checkpoint(file)
        except UserError as error:
            assert str(file) in str(error)
            found += 1
        else:  # a bit that means nothing, such as those that align the parts
            assert same(loaded["state_dict"], expected)
    assert found > 100
    for length in (0, 1, 1000, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match="x.ckpt"):
            load_checkpoint(file)


@pytest.mark.slow
def test_a_damaged_last_checkpoint_is_told_and_the_one_before_it_taken(fit, reference, cli, recipe: Path):
    whole = reference(*CONSTANT)
    cut = fit("--name", "cut", "--trainer.max_steps", 5, *CONSTANT)
    last = cut / "checkpoints" / "last.ckpt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    out = cli("fit", "--config", recipe, "--name", "cut", *CONSTANT, "--ckpt_path", "last")
    assert f"the checkpoint {last} is damaged" in out and "using best.ckpt of step 5" in out
    assert same(weights(whole), weights(cut)) and metrics(whole) == metrics(cut)


@pytest.mark.slow
def test_going_on_in_another_folder_deletes_nothing_of_the_first(fit):
    flags = ("--best.save_top_k", 2, "--best.filename", "best-{step}", *CONSTANT)
    first = fit(*flags, "--name", "a")
    before = {path.name: path.read_bytes() for path in (first / "checkpoints").iterdir()}
    assert before.keys() == {"best-5.ckpt", "best-10.ckpt", "last.ckpt"}
    checkpoint = first / "checkpoints" / "best-10.ckpt"
    second = fit(*flags, "--name", "b", "--ckpt_path", checkpoint, "--trainer.max_steps", 25)
    assert names(second) == {"best-20.ckpt", "best-25.ckpt", "last.ckpt"}
    assert {path.name: path.read_bytes() for path in (first / "checkpoints").iterdir()} == before


def test_a_run_that_was_moved_knows_its_best_checkpoint(fit, tmp_path: Path):
    flags = ("--best.monitor", "train/tokens", "--best.mode", "min", "--best.every_n_train_steps", 5, *CONSTANT)
    fit(*flags)
    (tmp_path / "runs").rename(tmp_path / "moved")
    run = fit(*flags, "--runs_dir", tmp_path / "moved", "--ckpt_path", "last", "--trainer.max_steps", 20)
    assert load_checkpoint(run / "checkpoints" / "best.ckpt")["global_step"] == 5


@pytest.mark.parametrize(
    ("every", "monitor", "steps"),
    [(10, "val/loss", [10, 20]), (4, "val/loss", [5, 10, 15, 20]), (5, "train/loss", None)],
)
def test_a_score_is_that_of_the_step_that_the_checkpoint_holds(fit, every: int, monitor: str, steps: Optional[list]):
    flags = ("--best.every_n_train_steps", every, "--best.monitor", monitor, "--best.save_top_k", -1)
    interval = 10 if every == 10 else 5
    run = fit(*flags, "--best.filename", "{step}", "--trainer.max_steps", 20, "--trainer.val_check_interval", interval)
    states = load_checkpoint(run / "checkpoints" / "last.ckpt")["callbacks"].values()
    (scores,) = [state["best_k_models"] for state in states if state.get("monitor") == monitor]
    found = {load_checkpoint(Path(path))["global_step"]: score.item() for path, score in scores.items()}
    assert sorted(found) == (steps or [5, 10, 15, 20])
    losses = logged(run, monitor)
    assert found == pytest.approx({step: losses[step] for step in found})


def test_what_is_not_a_number_is_never_the_best(fit):
    run = fit(*poison(validations=[0, 2]), "--trainer.max_steps", 15)
    assert list(map(str, logged(run, "val/loss").values())).count("nan") == 2
    assert load_checkpoint(run / "checkpoints" / "best.ckpt")["global_step"] == 10
    alone = fit(*poison(validations=[0]), "--trainer.max_steps", 5)
    assert names(alone) == {"last.ckpt"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("when", "step"),
    [
        (("--last.every_n_train_steps", 3), 3),
        (("--last.train_time_interval", "00:00:00:00", "--trainer.plugins", "BackgroundCheckpoints"), 4),
    ],
    ids=["steps", "time, background"],
)
def test_saved_by_steps_or_time_a_run_goes_on_exactly(fit, reference, recipe: Path, when: tuple, step: int):
    # an epoch has 7 steps, so that the second one is begun; a failure comes between two micro-batches
    plain = ("--trainer.accumulate_grad_batches", 2, "--data.batch_size", 16, "--trainer.val_check_interval", 9)
    whole, flags = reference(*plain), (*plain, *when)
    with pytest.raises(RuntimeError, match="power failure"):
        fit("--name", "cut", *flags, *callbacks((Stop, {"batches": 9})))
    cut = only(recipe.parent / "runs" / "cut")
    assert load_checkpoint(cut / "checkpoints" / "last.ckpt")["global_step"] == step
    fit("--name", "cut", *flags, "--ckpt_path", "last")
    assert same(weights(whole), weights(cut)) and metrics(whole) == metrics(cut)


@pytest.mark.slow
def test_a_step_and_its_validation_that_are_done_again_are_logged_once(fit, reference, recipe: Path):
    flags = ("--last.every_n_train_steps", 4)  # but the metrics were saved with the best checkpoint of step 5
    whole = reference(*flags)
    with pytest.raises(RuntimeError, match="power failure"):
        fit("--name", "cut", *flags, *callbacks((Stop, {"batches": 6})))
    cut = only(recipe.parent / "runs" / "cut")
    assert 5 in logged(cut, "val/loss")
    assert load_checkpoint(cut / "checkpoints" / "last.ckpt")["global_step"] == 4
    fit("--name", "cut", *flags, "--ckpt_path", "last")
    assert metrics(whole) == metrics(cut)


@pytest.mark.slow
def test_a_run_that_is_killed_just_after_it_went_on_has_still_logged_what_came_before(fit, monkeypatch):
    fit("--trainer.max_steps", 5, *CONSTANT)
    flags = ("--ckpt_path", "last", *CONSTANT, "--trainer.val_check_interval", 100)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power failure"):
        patch.setattr(ExperimentWriter, "save", lambda self: None)  # nothing that is logged reaches the disk
        fit(*flags, *callbacks((Stop, {"batches": 3})))
    run = fit(*flags)
    assert list(logged(run, "train/loss")) == list(range(1, 11)) and list(logged(run, "val/loss")) == [5, 10]


@pytest.mark.slow
def test_a_run_that_is_killed_as_it_goes_on_stays_the_one_that_it_was(fit, monkeypatch: pytest.MonkeyPatch):
    run = fit("--trainer.max_steps", 5, *CONSTANT)

    def killed(*_: Any, **__: Any) -> None:
        raise RuntimeError("power failure")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power failure"):
        patch.setattr(saving, "write", killed)
        fit("--ckpt_path", "last", *CONSTANT)
    assert fit("--ckpt_path", "last", *CONSTANT) == run
    assert (
        "max_steps: 5" in (run / "config.1.yaml").read_text() and "max_steps: 10" in (run / "config.yaml").read_text()
    )


@pytest.mark.slow
def test_saved_on_an_error_amid_accumulation_a_run_goes_on_exactly(fit, reference, recipe: Path):
    flags = ("--trainer.accumulate_grad_batches", 3, "--last.save_on_exception", "true")
    flags = (*flags, "--trainer.val_check_interval", 5)
    whole = reference(*flags)
    with pytest.raises(RuntimeError, match="power failure"):
        fit("--name", "cut", *flags, *callbacks((Stop, {"batches": 22})))
    cut = only(recipe.parent / "runs" / "cut")
    assert load_checkpoint(cut / "checkpoints" / "last.ckpt")["global_step"] == 7
    fit("--name", "cut", *flags, "--ckpt_path", "last")
    assert same(weights(whole), weights(cut)) and metrics(whole) == metrics(cut)


def test_a_state_that_could_not_be_loaded_safely_is_refused_when_it_is_saved(fit, recipe: Path):
    fit("--name", "plain", *callbacks((Remembers, {"kind": "plain"})), "--trainer.max_steps", 5)
    run = only(recipe.parent / "runs" / "plain")
    assert any("state" in s for s in load_checkpoint(run / "checkpoints" / "last.ckpt")["callbacks"].values())
    with pytest.raises(UserError, match="could not be loaded again.*Path"):
        fit("--name", "path", *callbacks((Remembers, {"kind": "path"})))
    assert names(only(recipe.parent / "runs" / "path")) == set()


@pytest.mark.slow
def test_a_run_that_saves_in_the_background_ends_when_all_is_written(fit, monkeypatch: pytest.MonkeyPatch):
    write = CheckpointFiles.save_checkpoint

    def slowly(*args: Any) -> None:
        time.sleep(0.5)
        write(*args)

    monkeypatch.setattr(CheckpointFiles, "save_checkpoint", slowly)
    run = fit("--trainer.plugins", "BackgroundCheckpoints")
    assert names(run) == {"best.ckpt", "last.ckpt"}
    for name in names(run):
        assert load_checkpoint(run / "checkpoints" / name)["global_step"] == 10


def test_an_error_in_the_background_is_one_of_the_run(fit, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> None:
        raise UserError("no room")

    monkeypatch.setattr(CheckpointFiles, "save_checkpoint", full)
    with pytest.raises(UserError, match="no room"):
        fit("--trainer.plugins", "BackgroundCheckpoints", "--trainer.max_steps", 5)


def test_what_is_saved_in_the_background_is_the_state_of_that_moment(tmp_path: Path):
    files = BackgroundCheckpoints()
    weight = torch.ones(1_000_000)
    rest = {"network": {}, "global_step": 1}
    files.save_checkpoint(rest | {"state_dict": {"a": weight, "tied": weight}}, tmp_path / "a.ckpt")
    weight.zero_()
    assert files.load_checkpoint(tmp_path / "a.ckpt", weights_only=True)["state_dict"]["a"].eq(1).all()
    assert (tmp_path / "a.ckpt").stat().st_size < 1.5 * 4_000_000
    files.save_checkpoint({"a": weight}, tmp_path / "b.ckpt")
    files.remove_checkpoint(tmp_path / "a.ckpt")
    files.teardown()
    assert [path.name for path in tmp_path.iterdir()] == ["b.ckpt"]


# Signals


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hook", "call", "number", "step"),
    [
        ("train", 3, signal.SIGUSR1, 2),  # amid the accumulation of the second step
        ("train", 8, signal.SIGTERM, None),  # a validation comes next
        ("train", 14, signal.SIGTERM, 7),  # the end of an epoch
        ("validation", 1, signal.SIGINT, 4),
    ],
)
def test_a_signal_ends_the_run_between_two_steps_and_it_goes_on_exactly(
    fit, reference, recipe: Path, capsys, hook: str, call: int, number: int, step: Optional[int]
):
    flags = ("--trainer.accumulate_grad_batches", 2, "--data.batch_size", 16, "--trainer.val_check_interval", 4)
    flags = (*flags, "--trainer.limit_val_batches", 2)
    whole = reference(*flags)
    with pytest.raises(SystemExit) as ended:
        fit("--name", "cut", *flags, *callbacks((Signals, {"hook": hook, "call": call, "numbers": [number]})))
    assert ended.value.code == 128 + number
    cut = only(recipe.parent / "runs" / "cut")
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("stopped by"))
    assert signal.Signals(number).name in said and "--ckpt_path last" in said
    assert load_checkpoint(cut / "checkpoints" / "last.ckpt")["global_step"] == (step or 4)
    assert not (cut / "model").exists()
    fit("--name", "cut", *flags, "--ckpt_path", "last")
    assert same(weights(whole), weights(cut)) and metrics(whole) == metrics(cut)


@pytest.mark.slow
def test_a_run_that_is_stopped_in_its_last_validation_still_makes_its_model(fit, recipe: Path, capsys):
    with pytest.raises(SystemExit):
        fit(*callbacks((Signals, {"hook": "validation", "call": 3, "numbers": [signal.SIGTERM]})))
    run = only(recipe.parent / "runs" / "tiny")
    assert load_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 10
    assert "which finishes the validation and writes model/" in capsys.readouterr().out and not (run / "model").exists()
    assert fit("--ckpt_path", "last") == run
    assert sorted(logged(run, "val/loss")) == [5, 10]
    assert (run / "model" / "model.safetensors").is_file()
    assert load_checkpoint(run / "checkpoints" / "best.ckpt")["global_step"] == 10
    with pytest.raises(UserError, match="raise trainer.max_steps"):
        fit("--ckpt_path", "last")


def test_signals_are_given_back_to_their_owners(fit):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    fit("--trainer.max_steps", 3)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


def test_a_second_signal_ends_the_run_at_once(recipe: Path):
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
    twice = {"hook": "train", "call": 7, "numbers": [signal.SIGTERM, signal.SIGTERM]}
    result = command("fit", "--config", recipe, *callbacks((Signals, twice)), env=environment)
    assert result.returncode == -signal.SIGTERM
    checkpoint = only(recipe.parent / "runs" / "tiny") / "checkpoints" / "last.ckpt"
    assert load_checkpoint(checkpoint)["global_step"] == 5


OFF = [f"--model.network.{name}_pdrop=0" for name in ("resid", "embd", "attn")]


def check_resumed_alone(fit, reference, cut: Path, strategy: tuple) -> None:
    """One process resumes what two have left, and does what it would have done from the start."""
    last = cut / "checkpoints" / "last.ckpt"
    assert last.is_dir() == ("--trainer.strategy.sharded_checkpoints" in strategy)
    step = load_checkpoint(last)["global_step"] + 3
    flags = (*OFF, *CONSTANT, "--trainer.limit_val_batches", 0, "--trainer.max_steps")
    fit("--name", "cut", *flags, step, "--ckpt_path", "last")
    whole = logged(reference(*flags, -(-step // 20) * 20), "train/loss")  # the same for most steps
    assert logged(cut, "train/loss") == pytest.approx({n: whole[n] for n in range(1, step + 1)}, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "number", "strategy"),
    [
        pytest.param(0, signal.SIGTERM, DDP, id="first"),
        pytest.param(1, signal.SIGUSR1, SHARDED, id="sharded"),  # fork: sharding
        pytest.param(1, signal.SIGTERM, TENSOR_PARALLEL, id="tp"),  # fork: sharding
    ],
)
def test_a_signal_to_one_of_two_processes_ends_both_and_one_process_goes_on(
    fit, reference, recipe: Path, rank: int, number: int, strategy: tuple
):
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
    here = callbacks((Signals, {"hook": "train", "call": 3, "numbers": [number], "rank": rank}))
    flags = ("--name", "cut", *OFF, *CONSTANT, *strategy, *here)
    result = command("fit", "--config", recipe, *flags, "--trainer.max_steps", 10**6, env=environment)
    assert result.returncode == 128 + number and "Traceback" not in result.stderr
    assert f"stopped by {signal.Signals(number).name}" in result.stdout
    check_resumed_alone(fit, reference, only(recipe.parent / "runs" / "cut"), strategy)


@pytest.mark.slow
def test_interrupting_two_processes_as_a_terminal_does_ends_both(fit, reference, recipe: Path):
    flags = ["--config", recipe, "--name", "cut", *OFF, *CONSTANT, *DDP, "--trainer.max_steps", 10**6]
    process = subprocess.Popen(
        [sys.executable, "-m", "lm_lightning", "fit", *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith("train 3/"))
        members = ["ps", "-o", "pid=", "-g", str(process.pid)]
        assert len(subprocess.run(members, capture_output=True, text=True).stdout.split()) == 2
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=900)
        assert process.returncode == 128 + signal.SIGINT and "Traceback" not in err
        assert "stopped by SIGINT" in out
        assert not subprocess.run(members, capture_output=True, text=True).stdout
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    check_resumed_alone(fit, reference, only(recipe.parent / "runs" / "cut"), DDP)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_in_a_validation_ends_both_and_it_is_done_again(fit, reference, recipe: Path):
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
    here = callbacks((Signals, {"hook": "validation", "call": 1, "numbers": [signal.SIGUSR1], "rank": 1}))
    flags = (*OFF, "--trainer.limit_val_batches", 1.0)
    result = command("fit", "--config", recipe, "--name", "cut", *flags, *DDP, *here, env=environment)
    assert result.returncode == 138 and "stopped by SIGUSR1 at step 5" in result.stdout, result.stderr
    whole = reference(*flags)
    cut = fit("--name", "cut", *flags, "--ckpt_path", "last")
    for metric in ("train/loss", "val/loss"):
        assert logged(cut, metric) == pytest.approx(logged(whole, metric), abs=1e-4)


def test_a_slurm_job_that_is_queued_again_goes_on_with_its_own_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for job in (7, 8):  # the second one's checkpoint is newer
        file = tmp_path / "tiny" / f"slurm-{job}-0-0" / "checkpoints" / "last.ckpt"
        CheckpointFiles().save_checkpoint({"network": {}, "state_dict": {}, "global_step": job}, file)
        os.utime(file, (job, job))
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\necho "$@"')
    srun.chmod(0o755)
    script = ROOT / "scripts" / "slurm" / "fit.sbatch"
    for job, goes_on in ((7, True), (9, False)):
        own = {"SLURM_JOB_ID": str(job), "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8"}
        environment = os.environ | own | {"RUNS_DIR": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        sbatch = ["bash", script, "--config", "tiny.yaml"]
        said = subprocess.run(sbatch, env=environment, capture_output=True, text=True, check=True).stdout
        assert (
            "--trainer.num_nodes 2 --trainer.devices 8" in said and f"--runs_dir {tmp_path} --config tiny.yaml" in said
        )
        assert said.strip().endswith("--ckpt_path last") == goes_on
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert newest_folder(str(tmp_path), "tiny").parent.name == "slurm-7-0-0"
    monkeypatch.delenv("SLURM_JOB_ID")
    assert newest_folder(str(tmp_path), "tiny").parent.name == "slurm-8-0-0"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("array", "number", "job"),
    [(False, signal.SIGUSR1, "77"), (True, signal.SIGUSR1, "70_3"), (False, signal.SIGTERM, None)],
)
def test_a_slurm_job_is_queued_again_when_its_time_is_over_and_resumes(
    fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, array: bool, number: int, job: Optional[str]
):
    own = {"JOB_ID": "77", "JOB_NAME": "train", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    own |= {"ARRAY_JOB_ID": "70", "ARRAY_TASK_ID": "3"} if array else {}
    for name, value in own.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n', encoding="utf-8")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    flags = ("--trainer.devices", 1, "--trainer.max_steps", 4, *CONSTANT)
    with pytest.raises(SystemExit) as ended:
        fit(*flags, *callbacks((Signals, {"hook": "train", "call": 2, "numbers": [number]})))
    assert ended.value.code == 128 + number
    calls = (tmp_path / "calls").read_text(encoding="utf-8") if (tmp_path / "calls").exists() else ""
    assert calls == (f"requeue {job}\n" if job else "")
    assert ("the job is requeued" in capsys.readouterr().out) == (job is not None)
    if array or job is None:
        return
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run = fit(*flags, "--ckpt_path", "last")
    assert run.name == "slurm-77-0-0" and load_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 4


# Divergence


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_is_not_finite_is_left_out(fit, capsys, fused: bool):
    flags = (*poison(steps=[3], on_nonfinite="skip"), "--trainer.accumulate_grad_batches", 2)
    flags = (*flags, "--trainer.val_check_interval", 5)
    run = fit(*flags, "--model.optimizer.init_args.fused", str(fused).lower())
    state = load_checkpoint(run / "checkpoints" / "last.ckpt")
    assert state["global_step"] == 10
    assert {int(s["step"]) for s in state["optimizer_states"][0]["state"].values()} == {9}
    assert all(tensor.isfinite().all() for tensor in state["state_dict"].values())
    counts = logged(run, "train/skipped_steps")
    assert [counts[step] for step in (3, 4, 10)] == [0, 1, 1]


def test_too_many_steps_left_out_in_a_row_stop_the_run(fit, recipe: Path):
    flags = (*poison(steps=[1, 3, 4, 5], on_nonfinite="skip"), "--model.skip_limit", 2)
    with pytest.raises(UserError, match=r"not finite at step 6, on the training samples \[.*after 2 steps in a row"):
        fit(*flags)


@pytest.mark.slow
def test_a_process_that_is_not_finite_makes_all_leave_the_step_out(recipe: Path):
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
    flags = (*poison(steps=[3], on_nonfinite="skip", rank=1), "--trainer.limit_val_batches", 0)
    result = command("fit", "--config", recipe, *flags, *DDP, env=environment)
    assert result.returncode == 0, result.stderr
    said = next(line for line in result.stdout.splitlines() if line.startswith("skipped: "))
    assert "at step 4" in said and said.count(",") == 1 + 3  # the samples of both processes
    assert logged(only(recipe.parent / "runs" / "tiny"), "train/skipped_steps")[10] == 1


@needs("diagnostics")
@pytest.mark.slow
def test_a_spike_names_its_samples_once_however_often_it_was_done(fit, cli, recipe: Path, capsys):
    flags = ("--name", "spiky", *poison(steps=[28], factor=30.0), "--trainer.max_steps", 40, *CONSTANT)
    with pytest.raises(RuntimeError, match="power failure"):
        fit(*flags, *callbacks((Stop, {"batches": 31})))
    assert "spike: the loss is" in capsys.readouterr().out
    run = fit(*flags, "--ckpt_path", "last")
    (spike,) = map(json.loads, (run / "spikes.jsonl").read_text().splitlines())
    assert spike["step"] == 29 and spike["loss"] > 5 * spike["mean_before"] and len(spike["samples"]) == 4
    shown = cli("prepare", "--config", recipe, "--show", *spike["samples"])
    assert all(f"--- sample {sample}\n" in shown for sample in spike["samples"])
