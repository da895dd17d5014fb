"""What `lm_lightning.profiling.compat` uses of PyTorch and Lightning is there."""

import inspect
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.profilers import Profiler

from lm_lightning.profiling import compat


def test_the_memory_of_gpus_can_be_recorded():
    assert "enabled" in inspect.signature(torch.cuda.memory._record_memory_history).parameters
    assert list(inspect.signature(torch.cuda.memory._dump_snapshot).parameters)[0] == "filename"


def test_the_actions_that_end_the_parts_of_a_step_are_those_of_lightning(tmp_path: Path):
    class Recorder(Profiler):
        def start(self, action_name: str) -> None:
            names.append(action_name)

        def stop(self, action_name: str) -> None:
            ended.append(action_name)

    names: list[str] = []
    ended: list[str] = []
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    options |= {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1, "gradient_clip_val": 1.0}
    Trainer(**options, profiler=Recorder(), default_root_dir=tmp_path).fit(BoringModel())
    assert compat.EPOCH in names
    for part, ends in compat.PARTS.items():
        for end in ends:
            assert any(name.endswith(end) for name in names), (part, end)
        assert any(compat.ends(part, name) for name in ended), part
