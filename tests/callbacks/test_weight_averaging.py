import csv
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from lm_lightning.checkpoints.loading import load_checkpoint

AVERAGE = {"class_path": "EMAWeightAveraging", "init_args": {"decay": 0.8}}
FLAGS = (
    *("--trainer.callbacks", json.dumps([AVERAGE]), "--model.schedule.shape", "constant"),
    *("--trainer.val_check_interval", 4, "--trainer.limit_val_batches", 1, "--trainer.num_sanity_val_steps", 0),
    *("--model.network.n_layer=1", "--model.network.n_embd=8"),
)


@pytest.mark.slow
def test_averaged_weights_are_validated_exported_and_resumed(fit, cli):
    """Lightning's exponential moving average, which a config chooses as a callback, without other code."""
    full = fit(*FLAGS, "--trainer.max_steps", 8)
    fit(*FLAGS, "--trainer.max_steps", 4, "--name", "resumed")
    resumed = fit(*FLAGS, "--trainer.max_steps", 8, "--name", "resumed", "--ckpt_path", "last")

    saved, again = (load_checkpoint(run / "checkpoints" / "last.ckpt") for run in (full, resumed))
    for part in ("state_dict", "current_model_state", "averaging_state"):
        assert saved[part].keys() == again[part].keys() and saved[part]
        for name, tensor in saved[part].items():
            torch.testing.assert_close(again[part][name], tensor, msg=f"{part} {name}")

    name = "transformer.h.0.mlp.c_fc.weight"
    average, current = (saved[part][f"network.{name}"] for part in ("state_dict", "current_model_state"))
    assert not torch.allclose(average, current, rtol=1e-3)
    for folder in (full / "model", full / "exported"):
        if not folder.exists():
            cli("export", full, "--checkpoint", "last", "--output", folder)
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(folder).state_dict()[name], average)

    cli("validate", full, "--ckpt_path", "last", "--trainer.limit_val_batches", 1)
    evaluation = next(full.glob("evaluations/*/evaluation.json"))
    with open(full / "metrics.csv", newline="") as file:
        losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row.get("val/loss")]
    assert json.loads(evaluation.read_text())["metrics"]["val/loss"] == pytest.approx(losses[-1], rel=1e-4)
