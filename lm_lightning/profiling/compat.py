"""Lightning: the names of its actions. PyTorch: the history of a GPU's memory."""

from pathlib import Path

import torch

# Names of actions that Lightning passes to profilers; they are only documented as examples. Alternative: none.
EPOCH = "run_training_epoch"
PARTS = {  # part of a step -> suffixes of the names of Lightning's actions
    "data": ("train_dataloader_next",),
    "transfer": ("batch_to_device",),
    "forward": ("training_step",),
    "backward": ("backward",),
    "optimizer": ("optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping", "lr_scheduler_step"),
    "validation": ("on_validation_model_eval",),  # ends with the strategy's on_validation_end, which comes last
    "checkpoints": ("save_checkpoint",),
}


def ends(part: str, action_name: str) -> bool:
    """Whether the end of an action is the end of a part of a step."""
    if part == "validation":
        return action_name.startswith("[Strategy]") and action_name.endswith("on_validation_end")
    return action_name.endswith(PARTS[part])


def record_memory() -> None:
    """Begins to record the memory allocations of GPUs, if one is used.

    PyTorch documents these functions (https://pytorch.org/docs/stable/torch_cuda_memory.html) despite their names.
    Alternative: `profile_memory` of the profiler, whose output the viewer cannot read.
    """
    if torch.cuda.is_initialized():
        torch.cuda.memory._record_memory_history()


def save_memory(file: Path) -> None:
    """Ends the recording of `record_memory`, and writes it as a pickle."""
    if torch.cuda.is_initialized():
        torch.cuda.memory._dump_snapshot(str(file))
        torch.cuda.memory._record_memory_history(enabled=None)
