"""Private APIs of PyTorch and Lightning that sharding needs.

The ways to split a matrix for tensor parallelism are subclasses of `ParallelStyle`, whose only method is `_apply`.
Alternative: `ColwiseParallel` and `RowwiseParallel`, which refuse GPT-2's `Conv1D`.
"""

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint import filesystem

# Module and name of the class of the entries in a sharded checkpoint's table of contents. Alternative: none, the public
# `Metadata.storage_data` holds its instances.
STORAGE_INFO = ("torch.distributed.checkpoint.filesystem", "_StorageInfo")
# The function that unpickles a `torch.layout`, which such a table has for each tensor.
LAYOUT = ("torch.serialization", "_get_layout")


def storage_info() -> Any:
    """The class of `STORAGE_INFO`."""
    return filesystem._StorageInfo


def set_parallel_sizes(strategy: ModelParallelStrategy, tensor_parallel: int, data_parallel: int) -> None:
    """Sets the size of the tensor-parallel groups of processes, and the number of these groups.

    Alternative: the arguments of ModelParallelStrategy, which it needs before the number of processes is known.
    """
    strategy._tensor_parallel_size, strategy._data_parallel_size = tensor_parallel, data_parallel
