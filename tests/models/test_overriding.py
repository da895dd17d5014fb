"""What a task may override of `LanguageModule` is documented, and what it overwrites by accident is refused."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

from lm_lightning.errors import UserError
from lm_lightning.models.gpt import CausalLM
from lm_lightning.models.module import LanguageModule
from lm_lightning.models.overriding import FIXED, hooks

NETWORK = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2}
CHANGING = {"network", "new_tensors", "resumed_at", "training_loss"}  # which this class itself sets later


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("total_steps", lambda self: 5, r"Task.total_steps overrides LanguageModule.total_steps, .* another name"),
        ("tokenizer", None, "Task.tokenizer overrides LanguageModule.tokenizer"),
        ("on_train_start", lambda self: None, r"Task.on_train_start must call super\(\).on_train_start"),
        ("training_step", lambda self, batch, batch_idx: None, r"Task.training_step must call super\(\).training_step"),
        ("on_save_checkpoint", 5, "Task.on_save_checkpoint overrides"),
    ],
)
def test_names_of_the_base_class_are_refused_in_a_class(name: str, value: Any, message: str):
    with pytest.raises(UserError, match=message):
        type("Task", (LanguageModule,), {name: value})
    mixin = type("Task", (), {name: value})
    with pytest.raises(UserError, match=message):
        type("Other", (mixin, CausalLM), {})


@pytest.mark.parametrize("name", ["optimizer_steps", "settings", "schedule", "val_loss", "checked", "metrics", "loss"])
@pytest.mark.parametrize("early", [True, False], ids=["before", "after"])
def test_attributes_of_the_base_class_are_refused_in_an_object(name: str, early: bool):
    class Task(LanguageModule):
        def __init__(self) -> None:
            if early:
                setattr(self, name, {"mine": 1})
            super().__init__(NETWORK)
            if not early:
                setattr(self, name, torch.nn.Linear(2, 2) if name == "loss" else {"mine": 1})

    with pytest.raises(UserError, match=rf"Task sets self\.{name}, which is an? \w+ of LanguageModule: choose another"):
        Task()


def test_a_network_of_ones_own_is_made_by_a_hook():
    class Task(LanguageModule):
        def __init__(self) -> None:
            super().__init__(NETWORK)
            self.network = torch.nn.Linear(2, 2)

    with pytest.raises(UserError, match=r"Task sets self\.network: override new_network instead"):
        Task().configure_model()


def test_hooks_and_names_of_ones_own_are_free():
    class Task(LanguageModule):
        unused = ("pooler.",)

        def __init__(self) -> None:
            super().__init__(NETWORK)
            self.steps, self.results = 3, {"mine": 1}

        def on_train_start(self) -> None:
            super().on_train_start()
            self.steps += 1

        def on_train_epoch_end(self) -> None:
            self.steps = 0

        @torch.no_grad()
        def network_made(self) -> None:
            self.results = {}

    assert Task().steps == 3


def test_all_attributes_of_the_base_class_are_known():
    own = vars(LanguageModule(NETWORK)) | dict(LanguageModule(NETWORK).named_children())
    assert own.keys() - vars(LightningModule()).keys() == FIXED | CHANGING


def test_every_hook_is_documented():
    documented = {"auto_class", "unused", "predict_step", *hooks(LanguageModule)}
    page = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
    rows = re.findall(r"^\| `(\w+)", page, flags=re.MULTILINE)
    assert documented == set(rows) and len(rows) == len(documented)
    docstring = inspect.getdoc(LanguageModule) or ""
    assert [name for name in documented if f"`{name}`" not in docstring] == []
