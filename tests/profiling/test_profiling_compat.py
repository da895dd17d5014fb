"""What `lm_lightning.profiling.compat` uses of PyTorch is there."""

import inspect

import torch


def test_the_memory_of_gpus_can_be_recorded():
    assert "enabled" in inspect.signature(torch.cuda.memory._record_memory_history).parameters
    assert list(inspect.signature(torch.cuda.memory._dump_snapshot).parameters)[0] == "filename"
