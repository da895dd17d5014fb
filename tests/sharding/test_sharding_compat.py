"""What sharding uses of PyTorch and Lightning is there, and behaves as we assume."""

import inspect
import pkgutil
from pathlib import Path

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint import FileSystemWriter, save
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from lm_lightning.sharding import compat


def test_the_sizes_of_model_parallel_strategies_can_be_set():
    strategy = ModelParallelStrategy()
    assert "_tensor_parallel_size" in vars(strategy) and "_data_parallel_size" in vars(strategy)
    compat.set_parallel_sizes(strategy, 2, 3)
    assert "self._tensor_parallel_size" in inspect.getsource(ModelParallelStrategy.setup_environment)
    assert (strategy._tensor_parallel_size, strategy._data_parallel_size) == (2, 3)


def test_tables_of_sharded_checkpoints_have_these_classes(tmp_path: Path):
    save({"a": torch.ones(3)}, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    table = (tmp_path / ".metadata").read_bytes()
    for module, name in (compat.STORAGE_INFO, compat.LAYOUT):
        assert module.encode() in table and name.encode() in table
        assert hasattr(pkgutil.resolve_name(module), name)
    info = inspect.signature(compat.storage_info()).parameters
    assert {"relative_path", "offset", "length", "transform_descriptors"} <= set(info)


def test_styles_of_tensor_parallelism_are_applied_by_one_method():
    assert ParallelStyle.__abstractmethods__ == {"_apply"}
    assert "._apply(module, device_mesh)" in inspect.getsource(parallelize_module)
