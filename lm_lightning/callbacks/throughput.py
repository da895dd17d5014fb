"""Throughput: tokens per second, model FLOPs utilization, and memory."""

import functools
import sys
import time
from typing import Any, Optional

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer

from lm_lightning.data import contract


class Throughput(Callback):
    """Logs `train/tokens_per_second`, `train/tokens`, `train/seconds`, `train/mfu` and `train/memory`.

    Tokens are those that the network has read, padding included, over all processes. `train/tokens` and `train/seconds`
    are totals of the run: a resumed run continues those of its checkpoint, so steps after it are not counted twice.
    Seconds are wall-clock time, validations and checkpoints included.

    Memory is the peak of this process, in GiB: that of PyTorch's tensors on a GPU, else of the process (its resident
    set, libraries included; not on Windows). A strategy may add more, as that for XLA does.

    MFU, the model FLOPs utilization, is the arithmetic of the network for these tokens, 6 FLOPs per parameter and token
    and, for attention, 12 per layer, hidden unit, context token and token (Chowdhery et al., 2022, arXiv:2204.02311,
    appendix B), divided by the peak of the device: that of a GPU's data sheet, or of a large matrix product on this
    CPU. The head counts for the targets only.
    """

    def __init__(self) -> None:
        self.tokens = self.targets = 0  # of this process since `since`
        self.since = 0.0
        self.total = self.step_tokens = 0  # over all processes, up to the last optimizer step and after it
        self.begin = self.earlier = 0.0  # when this run began, and the seconds of the runs that it resumes
        self.peak: Optional[float] = None
        self.flops_per_token = self.flops_per_target = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network = pl_module.network
        config = network.config
        # a lookup costs no arithmetic, even if its matrix is also that of the head
        head = network.get_output_embeddings()  # over the vocabulary, if there is one
        vocabulary = {network.get_input_embeddings().weight} | (set() if head is None else {head.weight})
        parameters = sum(p.numel() for p in network.parameters()) - sum(matrix.numel() for matrix in vocabulary)
        context = contract.optional(trainer.datamodule, "block_size") or 0  # unknown: attention is not counted
        self.flops_per_token = 6 * parameters + 12 * config.num_hidden_layers * config.hidden_size * context
        self.flops_per_target = 0 if head is None else 6 * head.weight.numel()
        self.peak = peak_flops(pl_module.device, trainer.precision_plugin.precision)
        self.begin = time.perf_counter()
        self.restart()

    def restart(self) -> None:
        self.tokens, self.targets, self.since = 0, 0, time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict, batch_idx: int
    ) -> None:
        self.tokens += batch["input_ids"].numel()
        self.targets += batch["targets"].numel()
        self.step_tokens += batch["input_ids"].numel() * contract.place(trainer)["num_replicas"]
        if pl_module.optimizer_steps.current is not None:  # the optimizer has not stepped yet
            return
        self.total, self.step_tokens = self.total + self.step_tokens, 0
        if trainer.global_step % trainer.log_every_n_steps:
            return
        seconds = time.perf_counter() - self.since
        metrics = {
            "train/tokens_per_second": self.tokens / seconds * contract.place(trainer)["num_replicas"],
            "train/tokens": self.total,
            "train/seconds": self.seconds(),
        }
        if self.peak:
            flops = self.tokens * self.flops_per_token + self.targets * self.flops_per_target
            metrics["train/mfu"] = flops / seconds / self.peak
        memory = peak_memory(pl_module.device)
        if memory is not None:
            metrics["train/memory"] = memory
        if hasattr(trainer.strategy, "throughput_metrics"):
            metrics |= trainer.strategy.throughput_metrics()
        pl_module.log_dict({name: torch.tensor(float(value)) for name, value in metrics.items()})
        self.restart()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.restart()  # other callbacks may still come, but validation itself is out

    def seconds(self) -> float:
        """The time that the run has taken so far."""
        return self.earlier + time.perf_counter() - self.begin

    def state_dict(self) -> dict:
        return {"tokens": self.total, "seconds": self.seconds()}

    def load_state_dict(self, state: dict) -> None:
        self.total, self.earlier = state["tokens"], state["seconds"]


def peak_flops(device: torch.device, precision: str) -> Optional[float]:
    """Floating-point operations a second that a device can do, None if unknown.

    Args:
        device: A GPU's figure is its data sheet's; a CPU's is measured in a quarter of a second.
        precision: Lightning's name of the precision, such as `bf16-mixed`.
    """
    dtype = {"bf16": torch.bfloat16, "16": torch.float16}.get(precision.split("-")[0], torch.float32)
    if device.type == "cuda":
        return get_available_flops(device, dtype)
    if device.type != "cpu":
        return None
    return cpu_flops(dtype, torch.get_num_threads())


@functools.cache
def cpu_flops(dtype: torch.dtype, threads: int) -> float:
    """Floating-point operations a second of the fastest of some matrix products, measured once in a process.

    Args:
        dtype: Of the matrices.
        threads: PyTorch's at present; another number is measured again.
    """
    a = torch.ones(1024, 1024, dtype=dtype)
    a @ a
    best, begin = float("inf"), time.perf_counter()
    while (start := time.perf_counter()) - begin < 0.25:
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


def peak_memory(device: torch.device) -> Optional[float]:
    """The most memory in GiB that this process has held so far, on a CUDA device or in all; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return None
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
