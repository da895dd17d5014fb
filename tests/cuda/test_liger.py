"""Liger's kernels: refused where they do not work, and applied without Liger's loss. (They need a GPU.)"""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from lm_lightning.cuda.changes import add_change
from lm_lightning.cuda.liger import LigerKernels
from lm_lightning.errors import UserError


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Puts a package in the place of liger-kernel, and returns what it is called with."""
    calls: list[dict[str, Any]] = []
    liger, patches = ModuleType("liger_kernel.transformers"), ModuleType("liger_kernel.transformers.monkey_patch")
    liger._apply_liger_kernel_to_instance = lambda **options: calls.append(options)  # type: ignore[attr-defined]
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"qwen3": print, "llama": print}  # type: ignore[attr-defined]
    for module in (ModuleType("liger_kernel"), liger, patches):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def changed(model_type: str, device: str = "cuda:0") -> None:
    """Sets the callback up on a device, and lets it change a network of a type."""
    module = SimpleNamespace(network=None, network_changes=[], print=print)
    trainer = SimpleNamespace(strategy=SingleDeviceStrategy(torch.device(device)))
    LigerKernels().setup(trainer, module, "validate")
    assert module.network_changes == []
    LigerKernels().setup(trainer, module, "fit")
    network = torch.nn.Linear(1, 1)
    network.config = SimpleNamespace(model_type=model_type)  # type: ignore[assignment]
    for change in module.network_changes:
        change(network)


def test_a_network_that_exists_already_is_not_left_unchanged():
    module = SimpleNamespace(network=torch.nn.Linear(1, 1), network_changes=[])
    with pytest.raises(UserError, match="list Float8 before it"):
        add_change(module, "Float8", print)


def test_kernels_are_applied_without_the_loss(applied):
    changed("llama")
    (options,) = applied
    assert options.pop("model").config.model_type == "llama"
    assert options == {"cross_entropy": False, "fused_linear_cross_entropy": False}


def test_what_has_no_kernels_is_refused(applied):
    with pytest.raises(UserError, match="no kernels for networks of type gpt2: .* use one of llama, qwen3"):
        changed("gpt2")
    with pytest.raises(UserError, match="needs a GPU with CUDA, but this run uses cpu"):
        changed("llama", "cpu")
    assert applied == []


def test_missing_package_is_named_with_the_command_that_installs_it(fit, monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(UserError, match=r'LigerKernels needs the package liger_kernel: pip install -e "\.\[cuda\]"'):
        fit("--trainer.callbacks+=LigerKernels")
