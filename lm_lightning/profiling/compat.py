"""PyTorch: the history of a GPU's memory."""

from pathlib import Path

import torch


def record_memory() -> None:
    """Begins to record what is allocated on GPUs, if one is used.

    PyTorch documents these functions (https://pytorch.org/docs/stable/torch_cuda_memory.html) in spite of their names.
    Alternative: `profile_memory` of the profiler, whose output the viewer does not read.
    """
    if torch.cuda.is_initialized():
        torch.cuda.memory._record_memory_history()


def save_memory(file: Path) -> None:
    """Ends what `record_memory` has begun and writes it as a pickle."""
    if torch.cuda.is_initialized():
        torch.cuda.memory._dump_snapshot(str(file))
        torch.cuda.memory._record_memory_history(enabled=None)
