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

    Tokens are the input tokens of all processes, including padding. `train/tokens` and `train/seconds` are totals of
    the run: a resumed run continues those of its checkpoint, so that repeated steps are not counted twice. Seconds are
    wall-clock time, including validations and checkpoints.

    Memory is the peak of this process in GiB: on a GPU, the memory of PyTorch's tensors; otherwise, the resident set of
    the process, including libraries (not available on Windows). A strategy may log more metrics, as the one for XLA
    does.

    MFU, the model FLOPs utilization, is the number of FLOPs that the network needs for these tokens (6 per parameter
    and token and, for attention, 12 per layer, hidden unit, context token and token; Chowdhery et al., 2022,
    arXiv:2204.02311, appendix B), divided by the peak of the device: from the data sheet of a GPU, or measured with a
    large matrix product on a CPU. The head counts only for the targets.
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
        # An embedding lookup needs no FLOPs, even if its matrix is shared with the head.
        head = network.get_output_embeddings()  # the head over the vocabulary, if there is one
        vocabulary = {network.get_input_embeddings().weight} | (set() if head is None else {head.weight})
        parameters = sum(p.numel() for p in network.parameters()) - sum(matrix.numel() for matrix in vocabulary)
        context = contract.optional(trainer.datamodule, "block_size") or 0  # unknown: attention is not counted
        layers, size = getattr(config, "num_hidden_layers", 0), getattr(config, "hidden_size", 0)
        self.flops_per_token = 6 * parameters + 12 * layers * size * context
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
        if pl_module.compile_body and trainer.global_step == pl_module.resumed_at + 1:
            pl_module.print(f"compiled: the first step took {time.perf_counter() - self.begin:.1f} s")
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
        self.restart()  # excludes the validation, although not the callbacks that run after this one

    def seconds(self) -> float:
        """The duration of the run so far."""
        return self.earlier + time.perf_counter() - self.begin

    def state_dict(self) -> dict:
        return {"tokens": self.total, "seconds": self.seconds()}

    def load_state_dict(self, state: dict) -> None:
        self.total, self.earlier = state["tokens"], state["seconds"]


def peak_flops(device: torch.device, precision: str) -> Optional[float]:
    """Peak FLOPs per second of a device; None if unknown.

    Args:
        device: The device. The value of a GPU is from its data sheet; that of a CPU is measured in 0.1 s.
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
    """FLOPs per second of the fastest of several matrix products; measured once per process.

    Args:
        dtype: Data type of the matrices.
        threads: Current number of PyTorch's threads; each number is measured separately.
    """
    a = torch.ones(1024, 1024, dtype=dtype)
    a @ a
    best, begin = float("inf"), time.perf_counter()
    while (start := time.perf_counter()) - begin < 0.1:
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


def peak_memory(device: torch.device) -> Optional[float]:
    """Peak memory of this process in GiB, on a CUDA device or in RAM; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return None
    import resource  # not available on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
