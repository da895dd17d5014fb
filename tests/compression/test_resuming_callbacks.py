"""Options of the callbacks that are changed on resuming: each is honored, or refused with a reason."""

import inspect
import json
from typing import Any

import pytest
from test_resuming import TINY

from lm_lightning.compression.callbacks import distillation, pruning, quantization, structured_pruning
from lm_lightning.errors import UserError

# A resume refuses to change options that the state in the checkpoint depends on; the others have their new values.
REFUSED = {"Pruning": "method pattern scope modules", "StructuredPruning": "kind method"}
HONORED = {
    "Pruning": "sparsity start end frequency table",
    "StructuredPruning": "keep start end frequency table",
    "Quantization": "recipe start modules table",
    "Distillation": "teacher weight temperature",
}


@pytest.mark.parametrize(
    "callback",
    [
        pruning.Pruning,
        structured_pruning.StructuredPruning,
        quantization.Quantization,
        distillation.Distillation,
    ],
)
def test_every_option_is_honored_or_refused(callback: type):
    name = callback.__name__
    listed = {*HONORED[name].split(), *REFUSED.get(name, "").split()}
    assert {*inspect.signature(callback).parameters} == listed, "say what happens if these are changed on a resume"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("callback", "name", "value"),
    [
        ("Pruning", "method", "movement"),
        ("Pruning", "modules", ["*mlp*"]),
        ("StructuredPruning", "method", "magnitude"),
    ],
)
def test_an_option_that_the_state_depends_on_is_refused(fit, callback: str, name: str, value: Any):
    flags = [*TINY, "--trainer.max_steps", 4, "--trainer.val_check_interval", 4]
    settings = {"frequency": 1, "end": 3, "table": False}

    def pruned(changes: dict[str, Any]) -> str:
        return json.dumps([{"class_path": callback, "init_args": settings | changes}])

    fit(*flags, "--trainer.callbacks", pruned({}))
    changed = [*flags, "--trainer.max_steps", 6, "--trainer.callbacks", pruned({name: value}), "--ckpt_path", "last"]
    with pytest.raises(UserError, match=f"the checkpoint was made with {callback}.{name} "):
        fit(*changed)
