"""XLA: what one CPU does, one XLA device and two do, too, and each step is a program that is there already.

All on the CPU, `PJRT_DEVICE=CPU`; `scripts/test_xla.sh` makes the environment that these tests need.
"""

import csv
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import command, needs, refusal
from lightning.pytorch import Callback, LightningModule, Trainer

os.environ.setdefault("PJRT_DEVICE", "CPU")
needs_xla = pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="torch_xla is not installed")
XLA = ("--trainer.accelerator", "auto", "--trainer.strategy", "xla")
SPMD = ("--trainer.accelerator", "auto", "--trainer.strategy", "xla_spmd")
TWO_DEVICES = os.environ | {"CPU_NUM_DEVICES": "2", "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture(scope="module", autouse=True)
def device() -> None:
    """Makes the device before the first backward pass, at which autograd counts the kinds that there are."""
    if importlib.util.find_spec("torch_xla") is not None:
        import torch_xla

        torch.zeros((), device=torch_xla.device())


class Counts(Callback):
    """Notes how many programs were compiled, and how many values fetched, up to each step and validation batch."""

    steps: dict[int, tuple[int, int]] = {}
    validation: dict[int, tuple[int, int]] = {}

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        self.steps[trainer.global_step] = self.now()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.validation[batch_idx] = self.now()

    def now(self) -> tuple[int, int]:
        from torch_xla.debug import metrics

        data = [metrics.metric_data(name) for name in ("CompileTime", "TransferFromDeviceTime")]
        return tuple(0 if entry is None else entry[0] for entry in data)


class Shardings(Callback):
    """Writes how the parameters and the optimizer's state lie on the devices before and after training."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.write(trainer, pl_module, "before")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.write(trainer, pl_module, "after")

    def write(self, trainer: Trainer, pl_module: LightningModule, name: str) -> None:
        import torch_xla

        rows = {}
        for key, parameter in pl_module.network.named_parameters():
            state = trainer.optimizers[0].state[parameter]
            tensors = (parameter, state["exp_avg"], state["exp_avg_sq"])
            rows[key] = [torch_xla._XLAC._get_xla_sharding_spec(tensor) for tensor in tensors]
        (Path(trainer.default_root_dir) / f"{name}.json").write_text(json.dumps(rows))


@pytest.fixture(params=["gpt2", pytest.param("bert", marks=needs("tasks.masked_lm"))])
def model_type(request: pytest.FixtureRequest, recipe: Path) -> str:
    """The tiny recipe without dropout, which every device draws in its own way, as a GPT or a BERT."""
    change(recipe, request.param)
    return request.param


def change(recipe: Path, model_type: str) -> None:
    content = yaml.safe_load(recipe.read_text())
    model, data = content["model"], content["data"]
    model["init_args"]["optimizer"]["init_args"]["lr"] = 9e-3  # (with 1e-2, 1 - lr * weight decay would be a beta)
    network = model["init_args"]["network"]
    if model_type == "gpt2":
        network |= {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    else:
        sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
        off = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
        model["class_path"], data["class_path"] = "MaskedLM", "MaskedData"
        model["init_args"]["network"] = {"model_type": "bert", "max_position_embeddings": 64} | sizes | off
        data["init_args"]["tokenizer"] |= {"algorithm": "wordpiece", "lowercase": True}
    recipe.write_text(yaml.safe_dump(content))


def metrics(run: Path) -> list[dict[str, float]]:
    """What was logged, but for what depends on the clock or the device."""
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    device = ("tokens_per_second", "seconds", "mfu", "memory", "epoch", "compilations")
    return [{k: float(v) for k, v in row.items() if v and not k.endswith(device)} for row in rows]


def assert_close(a: Path, b: Path) -> None:
    rows, others = metrics(a), metrics(b)
    assert len(rows) == len(others) > 0
    for row, other in zip(rows, others):
        assert row == pytest.approx(other, abs=1e-4, rel=1e-4)


@needs_xla
def test_one_device_does_what_the_cpu_does(fit, model_type: str):
    assert_close(fit("--name", "cpu"), fit("--name", "xla", *XLA))


@needs_xla
def test_micro_batches_do_what_those_of_the_cpu_do(fit, recipe: Path):
    change(recipe, "gpt2")
    flags = ("--data.batch_size", 1, "--trainer.accumulate_grad_batches", 4, "--trainer.val_check_interval", 5)
    assert_close(fit("--name", "cpu", *flags), fit("--name", "xla", *flags, *XLA))


@needs_xla
@pytest.mark.parametrize(
    ("kind", "flags"),
    [("gpt2", ()), ("gpt2", ("--data.mask_documents", "true")), ("bert", ("--data.next_sentence", "true"))],
    ids=["blocks", "documents", "pairs"],
)
def test_steps_compile_nothing_and_fetch_nothing_until_they_are_logged(fit, recipe: Path, kind: str, flags: tuple):
    change(recipe, kind)
    note = ("--trainer.callbacks", json.dumps([{"class_path": "test_xla.Counts"}]), "--trainer.log_every_n_steps", 6)
    length = ("--trainer.max_steps", 20, "--trainer.val_check_interval", 20, "--trainer.limit_val_batches", 4)
    run = fit(*XLA, *note, *length, *flags)
    programs, values = zip(*(Counts.steps[step] for step in sorted(Counts.steps)))
    assert programs[12] == programs[18]
    assert values[12] == values[16] < values[18]  # step 18 is logged, and seen to be finite in the next
    assert Counts.validation[1] == Counts.validation[3]
    with open(run / "metrics.csv", newline="") as file:
        compilations = [row["train/compilations"] for row in csv.DictReader(file) if row["train/compilations"]]
    assert len(compilations) == 3 and compilations[1] == compilations[2]


@needs_xla
@pytest.mark.parametrize(("first", "second"), [(XLA, ()), ((), XLA)], ids=["xla to cpu", "cpu to xla"])
def test_checkpoint_goes_on_on_the_other_device(fit, recipe: Path, first: tuple, second: tuple):
    from transformers import AutoModelForCausalLM

    change(recipe, "gpt2")
    constant = ("--model.schedule.shape", "constant")
    whole = fit("--name", "whole", *constant)
    part = fit("--name", "part", *constant, *first, "--trainer.max_steps", 5)
    state = torch.load(part / "checkpoints" / "last.ckpt", weights_only=True)
    tensors = [*state["state_dict"].values(), *state["optimizer_states"][0]["state"][0].values()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    assert fit("--name", "part", *constant, *second, "--ckpt_path", "last") == part
    assert_close(whole, part)
    exported = AutoModelForCausalLM.from_pretrained(part / "model").state_dict()
    last = torch.load(part / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, tensor in exported.items():
        assert torch.equal(tensor, last[f"network.{name}"][: len(tensor)])


@needs_xla
def test_resumed_run_draws_the_dropout_that_it_would_have(fit, recipe: Path):
    constant = ("--model.schedule.shape", "constant")
    whole = fit("--name", "whole", *constant, *XLA)
    fit("--name", "part", *constant, *XLA, "--trainer.max_steps", 5)
    assert_close(whole, fit("--name", "part", *constant, *XLA, "--ckpt_path", "last"))


@needs_xla
def test_two_devices_do_what_the_cpu_does_and_keep_a_part_each(fit, recipe: Path, model_type: str):
    constant = ("--model.schedule.shape", "constant")
    on = (*constant, "--ckpt_path", "last", "--trainer.max_steps")
    run = fit("--name", "two", *constant, "--trainer.max_steps", 5)
    note = ("--trainer.callbacks", json.dumps([{"class_path": "test_xla.Shardings"}]))
    result = command("fit", "--config", recipe, "--name", "two", *SPMD, *note, *on, 10, env=TWO_DEVICES)
    assert result.returncode == 0, result.stderr
    for when in ("before", "after"):
        for name, shardings in json.loads((run / f"{when}.json").read_text()).items():
            assert all("devices=[" in sharding for sharding in shardings), (when, name, shardings)
    assert fit("--name", "two", *on, 12) == run  # on the CPU again
    assert_close(fit("--name", "cpu", *constant, "--trainer.max_steps", 12), run)


@needs_xla
def test_two_devices_with_a_copy_of_the_parameters_each_do_what_the_cpu_does(fit, recipe: Path):
    change(recipe, "gpt2")
    strategy = {"class_path": "lm_lightning.xla.strategy.XLASharded", "init_args": {"shard_parameters": False}}
    flags = ("--trainer.accelerator", "auto", "--trainer.strategy", json.dumps(strategy))
    result = command("fit", "--config", recipe, "--name", "two", *flags, env=TWO_DEVICES)
    assert result.returncode == 0, result.stderr
    (run,) = (recipe.parent / "runs" / "two").iterdir()
    assert_close(fit("--name", "cpu"), run)


@needs_xla
def test_batch_that_does_not_divide_is_refused(recipe: Path):
    result = command("fit", "--config", recipe, *SPMD, "--data.batch_size", 3, env=TWO_DEVICES)
    assert "data.batch_size is 3" in refusal(result)


@needs_xla
@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--trainer.accelerator", "cpu"), "trainer.accelerator is cpu"),
        (("--trainer.accelerator", "auto", "--trainer.devices", 2), "trainer.devices is 2"),
        (("--trainer.accelerator", "auto", "--trainer.precision", "bf16-mixed"), "bf16-mixed"),
    ],
)
def test_what_xla_cannot_do_is_refused(fit, flags: tuple, reason: str):
    from lm_lightning.errors import UserError

    with pytest.raises(UserError) as refused:
        fit("--trainer.strategy", "xla", *flags)
    assert reason in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("strategy", ["xla", "xla_spmd", '{"class_path": "lm_lightning.xla.strategy.XLASharded"}'])
def test_without_torch_xla_the_refusal_says_how_to_install_it(fit, monkeypatch: pytest.MonkeyPatch, strategy: str):
    from lm_lightning.errors import UserError

    find = importlib.util.find_spec

    def without_xla(name: str, *args: Any) -> Any:
        return None if name == "torch_xla" else find(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", without_xla)
    with pytest.raises(UserError) as refused:
        fit("--trainer.accelerator", "auto", "--trainer.strategy", strategy)
    assert 'pip install -e ".[tpu]"' in str(refused.value) and "\n" not in str(refused.value)
