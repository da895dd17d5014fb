"""PyTorch: kernels, checkpoints and messages. (It is imported in the functions, since each start reads this file.)"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Messages of torch.distributed when another process of the run has died. Alternative: none; they are RuntimeErrors
# (`torch.distributed.DistNetworkError` is raised by stores only).
LOST_PEER = re.compile(r"(closed|reset) by peer|remote (process|worker)|Broken pipe")
# Module and name of the class of the entries in a sharded checkpoint's table of contents. Alternative: none, the public
# `Metadata.storage_data` holds its instances.
STORAGE_INFO = ("torch.distributed.checkpoint.filesystem", "_StorageInfo")
# The function that unpickles a `torch.layout`, which such a table has for each tensor.
LAYOUT = ("torch.serialization", "_get_layout")


def storage_info() -> Any:
    """The class of `STORAGE_INFO`."""
    from torch.distributed.checkpoint import filesystem

    return filesystem._StorageInfo


def multiply(tensors: Sequence["Tensor"], factor: "Tensor") -> None:
    """Multiplies tensors in place by a number, () float, in one kernel where devices have one.

    Alternative: a loop, which starts a kernel for each of hundreds of gradients.
    """
    import torch

    torch._foreach_mul_(list(tensors), factor)


def cpu_computes_bf16() -> bool:
    """Whether the CPU has instructions for bfloat16.

    Alternative: none for CPUs (`torch.cuda.is_bf16_supported` is for GPUs).
    """
    import torch

    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(check() for check in checks if check is not None)
