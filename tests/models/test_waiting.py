"""Training reads no value of a GPU in the middle of a step, which would make the host wait for it."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from lm_lightning.losses import linear_cross_entropy
from lm_lightning.models import steps
from lm_lightning.models.nonfinite import Copied
from lm_lightning.optim import MuonAdamW


def test_step_reads_no_value(monkeypatch: pytest.MonkeyPatch):
    """Tensors of the meta device, in the place of a GPU's, have no values: reading one raises an error."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device=None: False)  # that device has none
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
    monkeypatch.setattr(steps, "Copied", lambda loss: 1.0)
    trainer = SimpleNamespace(
        datamodule=SimpleNamespace(tokens_per_batch=8),
        strategy=SimpleNamespace(reduce=lambda totals, reduce_op: totals),
        precision_plugin=None,
        global_step=3,
        accumulate_grad_batches=2,
        world_size=1,
        log_every_n_steps=10,
    )
    model = torch.nn.Sequential(torch.nn.Embedding(16, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 16)).to("meta")
    names = {"embeddings": [model[0].weight, model[2].weight], "hidden": [model[1].weight]}
    names["vectors"] = [model[1].bias, model[2].bias]
    optimizer = MuonAdamW([{"name": name, "params": parameters} for name, parameters in names.items()])
    counted = steps.OptimizerSteps("stop", 2, lambda own: own, print)
    tokens = torch.zeros(2, 4, dtype=torch.long, device="meta")
    for _ in range(2):  # steps; the loss of the first is read in the second
        for _ in range(2):  # micro-batches
            hidden, targets = model[1](model[0](tokens)).flatten(0, 1), tokens.flatten()
            loss = linear_cross_entropy(hidden, model[2].weight, model[2].bias, targets, 15)
            counted.add(trainer, {"input_ids": tokens}, loss, (targets != -100).sum()).backward()
        counted.finish(trainer, model, optimizer, torch.device("cuda"))
        counted.clip_norm(model.parameters(), 1.0)
        optimizer.step()
    assert len(counted.nonfinite.pending) == 1


def test_host_waits_only_for_its_copy_of_a_loss(monkeypatch: pytest.MonkeyPatch):
    calls = []
    event = SimpleNamespace(record=lambda: calls.append("record"), synchronize=lambda: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    copied = Copied(torch.tensor(2.0))
    assert calls == ["record"]
    assert float(copied) == 2.0 and calls == ["record", "wait"]
