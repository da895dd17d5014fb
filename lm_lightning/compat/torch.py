"""PyTorch: kernels and messages. (Functions import it, as every command imports this file.)"""

import logging
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

# Messages of torch.distributed when another process of the run has died. Alternative: none; they are RuntimeErrors
# (`torch.distributed.DistNetworkError` is raised by stores only).
LOST_PEER = re.compile(r"(closed|reset) by peer|remote (process|worker|server shutdown)|Broken pipe")


def multiply(tensors: Sequence["Tensor"], factor: "Tensor") -> None:
    """Multiplies tensors in place by a scalar tensor, () float, in a single kernel if the device supports it.

    Alternative: a loop, which launches a kernel for each of hundreds of gradients.
    """
    import torch

    torch._foreach_mul_(list(tensors), factor)


def skip_step_if(optimizer: "Optimizer", skipped: "Tensor") -> None:
    """Makes a fused optimizer skip its next step within its kernels, without waiting for the device.

    `torch.amp.GradScaler` does it in the same way. Alternative: GradScaler itself, which also scales losses.

    Args:
        optimizer: An optimizer with `fused=True`.
        skipped: Whether to skip the step, () bool.
    """
    optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]


def hide_messages() -> None:
    """Hides warnings of PyTorch and its libraries, as about kernels for missing GPUs or about casts in each layer.

    Must be called before torch is imported. Alternative: none, they are logged at import.
    """
    # The profiler logs each of its steps, and PyTorch's C++ code warns about things that a user cannot change.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for library in ("torchao", "torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)


def cpu_computes_bf16() -> bool:
    """Whether the CPU has instructions for bfloat16.

    Alternative: none for CPUs (`torch.cuda.is_bf16_supported` is for GPUs).
    """
    import torch

    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(check() for check in checks if check is not None)
