"""Training with 8-bit floating point: emulated on a CPU, and refused where it could not be computed."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import needs
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from reading import Reader, under

from lm_lightning.checkpoints.loading import load_checkpoint
from lm_lightning.cuda import float8
from lm_lightning.errors import UserError

pytest.importorskip("torchao.float8")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = ("--model.network", json.dumps({"model_type": "llama", **SIZES}))
FLOAT8 = ("--trainer.callbacks+=Float8", "--trainer.callbacks.emulate", "true")


class Layers(Callback):
    """Keeps the classes of the linear layers of the last run."""

    classes: set[str] = set()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Layers.classes = {type(m).__name__ for m in pl_module.network.modules() if isinstance(m, torch.nn.Linear)}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]


def test_run_is_resumed_exactly_and_exported_as_any_other(fit):
    seen = ("--trainer.callbacks+=test_float8.Layers", "--model.schedule.shape", "constant")
    plain = fit(*LLAMA, *seen)
    assert Layers.classes == {"Linear"}
    run = fit(*LLAMA, *seen, *FLOAT8)
    assert Layers.classes == {"Linear", "Float8Linear"}  # that of the head, and those of the blocks
    half = fit(*LLAMA, *seen, *FLOAT8, "--trainer.max_steps", 5)
    assert fit(*LLAMA, *seen, *FLOAT8, "--trainer.max_steps", 10, "--ckpt_path", half / "checkpoints/last.ckpt") == half
    ends = [weights(folder) for folder in (run, half, plain)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert ends[0].keys() == ends[2].keys() and {type(w) for w in ends[0].values()} == {torch.Tensor}
    assert {w.dtype for w in ends[0].values()} == {torch.float32}
    different = [(ends[0][name] - ends[2][name]).abs().max() for name in ends[0]]
    assert 1e-4 < max(different) < 0.1  # it was rounded

    network = transformers.AutoModelForCausalLM.from_pretrained(run / "model")
    assert {type(m) for m in network.modules() if isinstance(m, torch.nn.Linear)} == {torch.nn.Linear}
    own = {name.removeprefix("network."): weight for name, weight in ends[0].items()}
    assert all(torch.equal(weight, own[name][: len(weight)]) for name, weight in network.state_dict().items())


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ((*LLAMA, "--trainer.callbacks+=Float8"), "needs an NVIDIA GPU of compute capability 8.9 or more, .* uses cpu"),
        (FLOAT8, r"Float8 skips 8 of 8 .* such as transformer.h.0.attn.c_attn \(Conv1D\): use a network"),
        (
            ("--model.network", json.dumps({"model_type": "llama", **SIZES, "intermediate_size": 40}), *FLOAT8),
            "Float8 skips 6 of 14 .* multiples of 16",
        ),
        pytest.param(
            (*LLAMA, "--trainer.callbacks+=Quantization", "--trainer.callbacks.start", 2, *FLOAT8),
            "quantization .* cannot round model.layers.0.self_attn.q_proj, whose class is Float8Linear",
            marks=needs("compression"),
        ),
    ],
    ids=["device", "class", "sizes", "quantization"],
)
def test_what_cannot_be_computed_is_refused(fit, flags: tuple, reason: str):
    with pytest.raises(UserError, match=reason):
        fit(*flags)


@pytest.mark.parametrize(
    ("capability", "precision", "emulate", "reason"),
    [
        ((8, 6), "bf16-mixed", False, "8.9 or more, but this run uses A GPU, 8.6"),
        ((8, 6), "bf16-mixed", True, None),
        ((8, 9), "32-true", False, "needs --trainer.precision bf16-mixed"),
        ((8, 9), "bf16-mixed", False, None),
        ((10, 0), "bf16-mixed", False, None),
        (None, "bf16-mixed", True, "needs --trainer.precision 32-true"),
    ],
)
def test_gpus_are_judged_by_their_capability(
    monkeypatch, capability: tuple | None, precision: str, emulate: bool, reason: str | None
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    device = torch.device("cuda" if capability else "cpu")
    if reason is None:
        float8.refuse_device(device, precision, emulate)
    else:
        with pytest.raises(UserError, match=reason):
            float8.refuse_device(device, precision, emulate)


@pytest.mark.slow
@under("docs/cuda.md", "NVIDIA GPUs")
def test_command_of_the_page(reader: Reader, typed: list[list[str]]):
    assert "float8: 28 linear layers (tensorwise)" in reader.type_all(typed)[0]
