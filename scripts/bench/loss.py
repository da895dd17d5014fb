"""Compares the time of this project's loss over the vocabulary with that of PyTorch's cross entropy.

python scripts/bench/loss.py [--tokens 4096] [--hidden 256] [--vocabulary 50304] [--device cpu]

Both are run alternately, forward and backward. It prints their median times and the ratio; on a GPU, also the peak
memory.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from lm_lightning.losses import linear_cross_entropy

parser = argparse.ArgumentParser()
parser.add_argument("--tokens", type=int, default=4096)
parser.add_argument("--hidden", type=int, default=256)
parser.add_argument("--vocabulary", type=int, default=50304)
parser.add_argument("--device", default="cpu")
parser.add_argument("--runs", type=int, default=5)
given = parser.parse_args()

hidden = torch.randn(given.tokens, given.hidden, device=given.device, requires_grad=True)
weight = torch.nn.Parameter(torch.randn(given.vocabulary, given.hidden, device=given.device) * 0.02)
targets = torch.randint(given.vocabulary, (given.tokens,), device=given.device)


def plain() -> torch.Tensor:
    """PyTorch's cross entropy, with all logits in memory."""
    return torch.nn.functional.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")


def ours() -> torch.Tensor:
    """This project's cross entropy, which computes the logits of some tokens at a time."""
    return linear_cross_entropy(hidden, weight, None, targets)


def run(loss: Callable[[], torch.Tensor]) -> tuple[float, float]:
    """The time of a forward and backward pass in seconds, and the peak memory in MiB (0 on a CPU)."""
    cuda = given.device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.autocast(hidden.device.type, torch.bfloat16):
        value = loss()
    value.backward()
    if cuda:
        torch.cuda.synchronize()
    hidden.grad = weight.grad = None
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() / 2**20 if cuda else 0.0


run(plain), run(ours)  # warm-up
pairs = [(run(plain), run(ours)) for _ in range(given.runs)]
for name, index in (("plain", 0), ("ours", 1)):
    seconds = statistics.median(pair[index][0] for pair in pairs)
    print(f"{name:6}{seconds:8.3f} s{max(pair[index][1] for pair in pairs):10.0f} MiB")
print(f"plain / ours: {statistics.median(a[0] / b[0] for a, b in pairs):.2f}")
