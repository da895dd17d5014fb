"""`model.compile`: the same losses and the same checkpoint as without, and a run may change it when it resumes."""

import csv
import platform
import re
import shutil
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler"),
]
# (compiled dropout draws other numbers)
PLAIN = [f"--model.network.{name}=0" for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")]
FLAGS = (*PLAIN, "--trainer.val_check_interval", 2, "--model.network.n_layer=1")


def losses(run: Path) -> list[float]:
    """Training and validation losses, in the order of the steps."""
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
        return [
            float(row[name]) for row in csv.DictReader(file) for name in ("train/loss", "val/loss") if row.get(name)
        ]


def test_compiled_training_is_that_of_the_plain_network(cli, fit, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # restored afterwards
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    plain = fit(*FLAGS, "--trainer.max_steps", 4)
    output = cli("fit", "--config", recipe, *FLAGS, "--trainer.max_steps", 4, "--model.compile", "true")
    compiled = Path(re.search(r"^run folder: (.*)$", output, re.M)[1])
    assert re.search(r"^compiled: the first step took [0-9.]+ s$", output, re.M)
    assert any((tmp_path / ".cache" / "lm_lightning" / "compiled" / platform.node()).iterdir())
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-4) and len(losses(plain)) == 6
    first, second = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (plain, compiled)
    )
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], atol=1e-4) for name in first)

    last = ("--trainer.max_steps", 6, "--ckpt_path", "last")
    assert fit(*FLAGS, *last, "--model.compile", "false") == compiled
    assert len(losses(compiled)) == 9
