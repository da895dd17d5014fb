"""tune: a study survives a kill, finds the best that was logged, ends bad trials, tells of failed ones; finders."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import yaml
from conftest import ROOT
from lightning.pytorch import Callback, LightningModule, Trainer

from lm_lightning.errors import UserError
from lm_lightning.tuning import fit_process
from lm_lightning.tuning.find import batch_size, largest, steepest
from lm_lightning.tuning.fit_process import logged
from lm_lightning.tuning.search_space import read_search_space
from lm_lightning.tuning.study import flags_of

SHORT = ("--trainer.max_steps", "3", "--trainer.val_check_interval", "1", "--trainer.limit_val_batches", "1")


def write(file: Path, content: dict) -> Path:
    file.write_text(yaml.safe_dump(content))
    return file


def trials(study: Path) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=None, storage=f"sqlite:///{study / 'study.db'}").trials


def processes(word: str) -> list[str]:
    """Command lines that have a word, of this machine's processes."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        found += [line] if word in line else []
    return found


@pytest.mark.slow
def test_study_that_was_killed_goes_on_to_the_number_of_trials(cli, recipe: Path, tmp_path: Path):
    flags = {
        "model.optimizer.init_args.lr": {"low": 1e-4, "high": 1e-1, "log": True},
        "data.block_size": {"choices": [32, 100]},  # the network has 64 positions
    }
    search = write(tmp_path / "search.yaml", {"flags": flags, "trials": 8, "pruner": "none", "seed": 2})
    command = ["tune", "--config", str(recipe), "--search", str(search), *SHORT]
    study = tmp_path / "runs" / "tiny-study"
    process = subprocess.Popen([sys.executable, "-m", "lm_lightning", *command], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 500
    while not list(study.glob("trial-002/*/")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while sys.platform == "linux" and processes(f"--runs_dir {study}"):
        assert time.monotonic() < deadline, "the trial outlives its study"
        time.sleep(0.1)
    assert trials(study)[2].params["data.block_size"] == 32 and not list(study.glob("trial-002/*/model"))

    out = cli(*command)
    assert "2 trials are done, 1 were interrupted" in out
    found = trials(study)
    cut, ended = found[2], found[:2] + found[3:]
    assert cut.state.name == "FAIL" and "reason" not in cut.user_attrs
    assert found[3].params == cut.params
    failed = [t for t in ended if t.state.name == "FAIL"]
    complete = [t for t in ended if t.state.name == "COMPLETE"]
    assert len(ended) == len(failed) + len(complete) == 8 and failed and len({str(t.params) for t in ended}) == 8
    assert all("positions for 64 tokens" in t.user_attrs["reason"] for t in failed)
    assert all(t.params["data.block_size"] == 100 for t in failed)
    assert f"8 trials: {len(complete)} complete, {len(failed)} failed" in out

    values = {}
    for trial in complete:
        (file,) = study.glob(f"trial-{trial.number:03}/*/metrics.csv")
        with open(file, newline="") as lines:
            values[trial.number] = min(float(row["val/loss"]) for row in csv.DictReader(lines) if row["val/loss"])
    assert {t.number: t.value for t in complete} == values
    best = min(values, key=lambda number: values[number])
    assert f"best: trial-{best:03}" in out
    assert [file.parent.parent.name for file in study.glob("trial-*/*/model")] == [f"trial-{best:03}"]
    config = yaml.safe_load((study / "best.yaml").read_text())
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == found[best].params[next(iter(flags))]
    assert (config["name"], config["runs_dir"]) == ("tiny", str(tmp_path / "runs"))
    assert (study / "parallel.png").stat().st_size > 1000

    with pytest.raises(UserError, match="started with another trainer"):
        cli(*command, "--trainer.max_steps", 5)
    assert len(trials(study)) == 9


@pytest.mark.slow
def test_bad_trial_is_ended_early(cli, recipe: Path, tmp_path: Path):
    good = write(tmp_path / "good.yaml", {"trainer": {"max_steps": 10}})
    bad = {"init_args": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-7}}}}
    bad = write(tmp_path / "bad.yaml", {"trainer": {"max_steps": 10**6}, "model": bad})
    flags = {"config": {"choices": [str(good), str(bad)]}}
    content = {"flags": flags, "trials": 2, "pruner_startup": 1, "trial_timeout": 60, "seed": 2}
    out = cli("tune", "--config", recipe, "--search", write(tmp_path / "search.yaml", content), "--study", "pruned")
    found = trials(tmp_path / "runs" / "pruned")
    assert [(Path(t.params["config"]).stem, t.state.name) for t in found] == [("good", "COMPLETE"), ("bad", "PRUNED")]
    assert "pruned at step" in out and "2 trials: 1 complete, 1 pruned" in out


@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/tuning/*.yaml")), ids=lambda file: file.stem)
@pytest.mark.slow
def test_search_space_of_the_project_runs(file: Path, cli, tmp_path: Path, cache_dir: Path, corpus_file: Path):
    search = read_search_space(str(file))
    for end in ("low", "high"):
        values = {flag: v.choices[-1] if v.choices else getattr(v, end) for flag, v in search.flags.items()}
        cli(
            *("fit", "--config", ROOT / "configs" / file.name, *flags_of(values), "--runs_dir", tmp_path),
            *("--data.cache_dir", cache_dir, "--data.corpus.paths", corpus_file, "--data.tokenizer.vocab_size", 400),
            *("--model.network.n_layer=1", "--model.network.n_embd=32", "--model.network.n_head=2"),
            *("--data.corpus.validation_fraction", 0.1, "--data.block_size", 32, "--data.batch_size", 2),
            *("--trainer.max_steps", 102, "--trainer.limit_val_batches", 1, "--trainer.callbacks", "null"),
        )
    assert all(logged(run, search.metric) for run in (tmp_path / file.stem).glob("*/"))


LR = {"low": 1e-4, "high": 1e-1}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"flags": {}}, "no flags"),
        ({"flags": {"lr": LR}, "trails": 3}, "trails"),
        ({"flags": {"lr": LR}, "trials": 0}, "trials 0"),
        ({"flags": {"lr": LR}, "trials": "many"}, "many"),
        ({"flags": {"lr": LR}, "direction": "down"}, "down"),
        ({"flags": {"lr": {"low": 2, "high": 1}}}, "the values of lr in the search space are invalid"),
        ({"flags": {"lr": {"low": 0.0, "high": 1.0, "log": True}}}, "the values of lr in the search space are invalid"),
        ({"flags": {"lr": {"low": 1}}}, "give low and high, or choices"),
        ({"flags": {"lr": {"low": 1, "choices": [1, 2]}}}, "choices cannot have low"),
        ({"flags": {"lr": {"lower": 1}}}, "lower"),
        ({"flags": {"lr": 3}}, "needs flags, each with"),
        ({"trials": 3}, "needs flags"),
        ([1, 2], "search.yaml"),
    ],
)
def test_mistake_in_a_search_space_is_refused_in_one_sentence(content: object, reason: str, tmp_path: Path):
    with pytest.raises(UserError, match=reason) as refused:
        read_search_space(str(write(tmp_path / "search.yaml", content)))  # type: ignore
    assert "\n" not in str(refused.value) and "search.yaml" in str(refused.value) or "lr" in str(refused.value)


def test_unknown_flag_is_refused_before_a_trial(cli, recipe: Path, tmp_path: Path):
    search = write(tmp_path / "search.yaml", {"flags": {"model.optimiser.lr": LR}})
    with pytest.raises(UserError, match="optimiser"):
        cli("tune", "--config", recipe, "--search", search)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags", [(), ("--search", "x.yaml", "--find", "lr"), ("--search", "x.yaml")])
def test_what_is_to_be_done_must_be_said(cli, recipe: Path, flags: tuple):
    with pytest.raises(UserError, match="give --search FILE|no search space x.yaml"):
        cli("tune", "--config", recipe, *flags)


# Finders


def test_steepest_fall_of_the_loss_is_found():
    rates = [10 ** (-6 + i / 10) for i in range(60)]
    loss = [5.0 if rate < 1e-3 else max(1.0, 5.0 - 4 * (i - 30) / 10) for i, rate in enumerate(rates)]
    diverged = [value if rate < 0.1 else value + 50 * rate for value, rate in zip(loss, rates)]
    assert 1e-3 < steepest(list(zip(rates, diverged))) < 1e-2
    assert steepest([(rate, 5.0 + rate) for rate in rates]) is None


@pytest.mark.parametrize("limit", [0, 1, 5, 11, 12, 100])
def test_largest_size_is_found_with_none_tried_that_is_twice_too_large(limit: int):
    sizes, tried = [1, 2, 3, 4, 6, 8, 12, 16, 24, 48], []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    assert largest(sizes, fits) == max((size for size in sizes if size <= limit), default=None)
    assert len(tried) == len(set(tried)) <= 8
    assert max(tried) <= max(1, 3 * limit)


@pytest.mark.slow
def test_learning_rate_is_found(cli, recipe: Path):
    out = cli("tune", "--config", recipe, "--find", "lr")
    found = float(out.split("--model.optimizer.init_args.lr ")[1])
    assert 1e-4 < found < 0.1  # a tiny network learns at rates around 0.01


class Greedy(Callback):
    """Has memory for one sample."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: dict, batch_idx: int) -> None:
        if len(batch["id"]) > 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.slow
def test_largest_micro_batch_is_found_and_the_global_batch_kept(cli, recipe: Path, monkeypatch):
    path = [str(Path(__file__).parent), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    flags = ("--data.batch_size", 3, "--trainer.accumulate_grad_batches", 1)
    out = cli("tune", "--config", recipe, "--find", "batch_size", *flags, "--trainer.callbacks", f"{__name__}.Greedy")
    assert "micro-batch 3: out of memory, does not fit" in out
    assert "--data.batch_size 1 --trainer.accumulate_grad_batches 3" in out


def test_memory_limit_is_kept(cli, recipe: Path):
    with pytest.raises(UserError, match="not even a micro-batch of one sample fits"):
        cli("tune", "--config", recipe, "--find", "batch_size", "--memory", 0.001)


def test_data_modules_without_a_batch_size_are_refused(monkeypatch: pytest.MonkeyPatch):
    printed = "model: {class_path: CausalLM}\ndata: {class_path: own.Plain}\ntrainer: {}\n"
    monkeypatch.setattr(fit_process, "fit", lambda *_: (printed, ""))
    with pytest.raises(UserError, match="own.Plain has no option batch_size"):
        batch_size(["--config", "plain.yaml"])
