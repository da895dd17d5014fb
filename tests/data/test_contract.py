"""The contract of data modules: a plain one of a user trains, resumes, evaluates and exports."""

import csv
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import needs
from lightning.pytorch import LightningDataModule
from processes import Runs
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Sampler
from transformers import AutoModelForCausalLM

from lm_lightning.data.contract import check_loader
from lm_lightning.errors import UserError
from lm_lightning.security.trust import PACKAGES

TOKENS = 20


def samples(number: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Sequences that count upwards from a random token."""
    starts = torch.randint(0, TOKENS, (number, 1), generator=torch.Generator().manual_seed(seed))
    rows = (starts + torch.arange(9)) % TOKENS
    return [{"input_ids": row[:-1], "targets": row[1:]} for row in rows]


class Plain(LightningDataModule):
    """What a user may write who knows Lightning, and nothing of this project."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(samples(40, 0), batch_size=4)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(samples(10, 1), batch_size=4)

    predict_dataloader = val_dataloader


class Order(Sampler):
    """Batches from a position on."""

    def __init__(self, data: "Resumable") -> None:
        self.data = data

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Any:
        start = self.data.consumed
        return iter([[(start + 4 * batch + row) % 40 for row in range(4)] for batch in range(10)])


class Resumable(Plain):
    """One that saves its position."""

    def __init__(self) -> None:
        super().__init__()
        self.consumed = 0

    def train_dataloader(self) -> DataLoader:
        return DataLoader(samples(40, 0), batch_sampler=Order(self))

    def state_dict(self) -> dict:
        return {"consumed": self.consumed}

    def load_state_dict(self, state: dict) -> None:
        self.consumed = state["consumed"]


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(samples(40, 0))


class Lists(Plain):
    """Batches of a form that no model of this project reads."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader([row["input_ids"] for row in samples(40, 0)], batch_size=4)

    val_dataloader = train_dataloader


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(PACKAGES, "test_contract")  # which the run's own config names
    network = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 16, "vocab_size": TOKENS}
    settings = {
        "model": {
            "class_path": "CausalLM",
            "init_args": {
                "network": network | {"resid_pdrop": 0.1, "attn_pdrop": 0.0, "embd_pdrop": 0.0},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
                "schedule": {"shape": "constant", "warmup_ratio": 0.0},
            },
        },
        "data": {"class_path": "test_contract.Resumable"},
        "trainer": {
            **{"max_steps": 25, "val_check_interval": 5, "log_every_n_steps": 1, "enable_progress_bar": False},
            **{"accelerator": "cpu", "devices": 1, "precision": "32-true"},
        },
        "runs_dir": str(tmp_path / "runs"),
        "name": "plain",
    }
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "plain.yaml"


def folder(out: str) -> Path:
    return Path(out.split(" folder: ")[1].splitlines()[0])


def logged(run: Path, name: str) -> list[float]:
    with open(run / "metrics.csv", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def loss_of(model: Path) -> float:
    """The mean loss of the validation samples, by transformers alone."""
    network = AutoModelForCausalLM.from_pretrained(model).eval()
    rows = samples(10, 1)
    inputs, targets = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "targets"))
    with torch.no_grad():
        logits = network(input_ids=inputs).logits
    assert logits.shape[-1] == TOKENS
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()


def test_plain_data_module_trains_evaluates_predicts_and_exports(cli, config: Path, tmp_path: Path):
    run = folder(cli("fit", "--config", config, "--data", "test_contract.Plain"))
    losses = logged(run, "val/loss")
    assert len(logged(run, "train/loss")) == 25 and losses[-1] < 1.5 < losses[0]
    assert {"val/perplexity"} <= set((run / "metrics.csv").read_text().splitlines()[0].split(","))
    assert (
        not logged(run, "val/bits_per_byte") and not (run / "data.json").exists() and not (run / "tokenizer").exists()
    )
    assert loss_of(run / "model") == pytest.approx(min(losses), abs=1e-5)
    cli("export", run, "--checkpoint", "last", "--output", tmp_path / "last")
    assert loss_of(tmp_path / "last") == pytest.approx(losses[-1], abs=1e-5)
    for flags in ((), ("--ckpt_path", "last")):
        record = json.loads((folder(cli("validate", run, *flags)) / "evaluation.json").read_text())
        expected = losses[-1] if flags else min(losses)
        assert record["metrics"]["val/loss"] == pytest.approx(expected, abs=1e-5) and record["data"] is None
    rows = (folder(cli("predict", run)) / "predictions.jsonl").read_text().splitlines()
    predictions = [json.loads(row) for row in rows]
    assert [row["id"] for row in predictions] == list(range(10)) and "text" not in predictions[0]
    assert sum(row["loss"] for row in predictions) / 10 == pytest.approx(min(losses), abs=1e-5)


@pytest.mark.slow
def test_run_resumes_amid_an_epoch_where_the_data_module_saves_its_position(cli, config: Path):
    """In the same bits, dropout included."""
    full = folder(cli("fit", "--config", config))
    with pytest.raises(RuntimeError, match="power failure"):
        stop = ("--trainer.callbacks+=test_fit.Stop", "--trainer.callbacks.step", 17)
        cli("fit", "--config", config, "--name", "part", *stop, "--last.every_n_train_steps", 3)
    part = folder(cli("fit", "--config", config, "--name", "part", "--ckpt_path", "last"))
    assert logged(full, "train/loss") == logged(part, "train/loss")
    weights = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (full, part)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def loader(**options: Any) -> DataLoader:
    return DataLoader(samples(40, 0), **options)


@pytest.mark.parametrize(
    ("make", "distributed"),
    [
        (lambda: loader(batch_size=4), False),
        (lambda: loader(batch_size=4, shuffle=True), False),
        (lambda: loader(batch_size=4, sampler=DistributedSampler(samples(40, 0), 2, 0)), True),
        (lambda: loader(batch_sampler=Order(Resumable())), True),
        (lambda: DataLoader(Stream(), batch_size=4), True),
        (lambda: samples(40, 0), True),  # no DataLoader of PyTorch: nothing is known of it
    ],
    ids=["sequential", "random", "distributed", "own", "iterable", "list"],
)
@pytest.mark.parametrize("replicas", [1, 2])
def test_loader_that_gives_all_processes_the_same_samples_is_refused(make, distributed: bool, replicas: int):
    strategy = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": replicas, "rank": 0})
    trainer: Any = SimpleNamespace(train_dataloader=make(), strategy=strategy, datamodule=Plain())
    if distributed or replicas == 1:
        check_loader(trainer)
    else:
        with pytest.raises(UserError, match=r"same samples of Plain: add --trainer.use_distributed_sampler true"):
            check_loader(trainer)


@pytest.mark.slow
def test_two_processes_share_the_samples_or_are_refused(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    runs = Runs(tmp_path)
    flags = ("--data", "test_contract.Plain", "--trainer.strategy", "ddp", "--trainer.devices", 2)
    flags = (*flags, "--trainer.max_steps", 5)
    command = ("fit", "--config", config, *flags)
    runs({"refused": command, "shared": (*command, "--trainer.use_distributed_sampler", "true")})
    assert "all processes would read the same samples of Plain" in runs.error("refused")
    assert not runs.error("shared") and len(runs.log("shared", "step", "train/loss")) == 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "test_contract.Lists"], "Lists yields batches of type Tensor, but must yield dicts with input_ids"),
        (["--model.network.vocab_size", 10], "Resumable yields the token 19, but the vocab_size of the network is 10"),
        (["--model.network.vocab_size", "null"], "has no tokenizer, so model.network needs vocab_size"),
        pytest.param(
            *(["--trainer.callbacks+=Samples"], "Samples need a tokenizer, which the data module does not have"),
            marks=needs("generation"),
        ),
    ],
)
def test_what_does_not_fit_is_refused(cli, config: Path, flags: list, message: str):
    with pytest.raises(UserError, match=message):
        cli("fit", "--config", config, *flags)
