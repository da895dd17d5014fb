"""XLA: trains on TPUs with programs that `torch_xla` compiles.

On an XLA device, PyTorch records operations lazily. At the end of a micro-batch or an optimizer step, the recorded
operations are a program, which is compiled unless the same program, with the same shapes, has been compiled before.
Reading a value before that splits the program and makes the host wait, so values are only read when they are logged.

The environment variable `PJRT_DEVICE` sets the type of the devices: `TPU`, or `CPU`, with which this module is tested;
with `CPU_NUM_DEVICES=2`, the CPU counts as two devices.
"""

import importlib.util
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Optional

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry, XLAAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy, SingleDeviceXLAStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lm_lightning import strategies
from lm_lightning.errors import UserError
from lm_lightning.xla import compat

STRATEGIES = ("xla", "xla_spmd", f"{__name__}.XLA", f"{__name__}.XLASharded")  # names for trainer.strategy


class XLADevices(XLAAccelerator):
    """Lightning's accelerator for TPUs, extended to all devices of `torch_xla`; the strategy sets their number."""

    @staticmethod
    def parse_devices(devices: Any) -> int:
        if devices not in (1, "1"):
            raise UserError(
                f"trainer.devices is {devices}, but xla uses one device and xla_spmd all devices: omit it (the number "
                "of devices of a CPU is set by the environment variable CPU_NUM_DEVICES)"
            )
        return 1

    @staticmethod
    def get_parallel_devices(devices: int) -> list[torch.device]:
        return [torch.device("xla", 0)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "xla"


class XLA(SingleDeviceXLAStrategy):
    """One device, with `torch_xla`."""

    quantized_weights = False
    lazy = True
    checkpoint_io = (
        SingleDeviceStrategy.checkpoint_io
    )  # accepts any; Lightning accepts only one that copies tensors to the CPU

    def __init__(self) -> None:
        super().__init__(device=torch.device("xla", 0))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        super().save_checkpoint(apply_to_collection(checkpoint, Tensor, Tensor.cpu), filepath, storage_options)

    def setup(self, trainer: Trainer) -> None:
        from torch_xla import runtime

        devices = runtime.global_runtime_device_count() if runtime.is_spmd() else 1
        print(f"xla: {runtime.device_type()} x {devices}")
        compat.skip_mask_checks()
        super().setup(trainer)

    def teardown(self) -> None:
        compat.restore_mask_checks()
        super().teardown()

    def tensor_init_context(self, empty_init: Optional[bool] = None) -> AbstractContextManager:
        return torch.device("cpu")  # so that new weights are the same as without XLA, and need no program

    def batch_to_device(self, batch: Any, device: Optional[torch.device] = None, dataloader_idx: int = 0) -> Any:
        import torch_xla

        torch_xla.sync()  # so that each micro-batch is a program of its own
        return super().batch_to_device(batch, device, dataloader_idx)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        import torch_xla

        output = super().validation_step(*args, **kwargs)
        torch_xla.sync()  # otherwise each metric would be a program that computes the last batch again
        return output

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        import torch_xla

        output = super().test_step(*args, **kwargs)
        torch_xla.sync()
        return output

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        import torch_xla

        torch_xla.manual_seed(torch.initial_seed())  # XLA has its own random generator; the module seeds only torch's
        return super().training_step(*args, **kwargs)

    def throughput_metrics(self) -> dict[str, float]:
        """`train/compilations`, the number of programs compiled so far: if it keeps increasing, shapes change."""
        from torch_xla.debug import metrics

        data = metrics.metric_data("CompileTime")
        return {"train/compilations": data[0] if data else 0}


class XLASharded(XLA):
    """All devices of a machine, used by one process (SPMD: single program, multiple data), with `torch_xla`.

    The samples of a batch are split over the devices: `data.batch_size` is the number for all devices together, and
    must be a multiple of the number of devices. XLA determines the communication between them (Xu et al., 2021, GSPMD,
    arXiv:2105.04663).

    Args:
        shard_parameters: Whether to split the parameters and the optimizer's state over the devices (fully sharded),
            instead of copying them to each device.
    """

    def __init__(self, shard_parameters: bool = True) -> None:
        from torch_xla import runtime

        runtime.use_spmd()  # must be called before the first tensor is created
        super().__init__()
        self.shard_parameters = shard_parameters

    def setup(self, trainer: Trainer) -> None:
        from torch_xla import runtime
        from torch_xla.distributed import spmd

        self.mesh, batch_size = spmd.get_1d_mesh("devices"), trainer.datamodule.batch_size
        if runtime.process_count() > 1:
            raise UserError("xla_spmd uses the devices of a single machine: start it with --trainer.num_nodes 1")
        if batch_size % self.mesh.size():
            raise UserError(
                f"data.batch_size is {batch_size}, but must be a multiple of {self.mesh.size()}, the number of devices"
            )
        super().setup(trainer)

    def batch_to_device(self, batch: Any, device: Optional[torch.device] = None, dataloader_idx: int = 0) -> Any:
        batch = super().batch_to_device(batch, device, dataloader_idx)
        return apply_to_collection(batch, Tensor, self.split, dimensions=(0,))

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if self.shard_parameters:
            # Tensors that are computed from these, such as gradients and the optimizer's state, are split likewise.
            for parameter in model.parameters():
                self.split(parameter, dimensions=by_length(parameter))
        return model

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        super().load_optimizer_state_dict(checkpoint)  # loaded tensors are not split yet
        if self.shard_parameters:
            for optimizer in self.optimizers:
                for parameter, state in optimizer.state.items():
                    for tensor in state.values():
                        if isinstance(tensor, Tensor) and tensor.shape == parameter.shape:
                            self.split(tensor, dimensions=by_length(tensor))

    def split(self, tensor: Tensor, dimensions: Iterable[int]) -> Tensor:
        """Splits a tensor over the devices, in place, along the first of the dimensions that is divisible, if any."""
        from torch_xla.distributed import spmd

        for dimension in dimensions:
            if tensor.shape[dimension] % self.mesh.size() == 0:
                spec = tuple("devices" if d == dimension else None for d in range(tensor.ndim))
                spmd.mark_sharding(tensor, self.mesh, spec)
                break
        return tensor


def by_length(tensor: Tensor) -> list[int]:
    """The dimensions of a tensor, longest first."""
    return sorted(range(tensor.ndim), key=lambda dimension: -tensor.shape[dimension])


def complete_settings(trainer: Any) -> None:
    """Sets the accelerator that these strategies need, and the default precision of XLA's devices.

    Args:
        trainer: The trainer's settings.

    Raises:
        UserError: If torch_xla is missing, or another accelerator was given.
    """
    if getattr(trainer.strategy, "class_path", trainer.strategy) in STRATEGIES:
        if importlib.util.find_spec("torch_xla") is None:
            raise UserError(
                f"trainer.strategy {trainer.strategy} needs torch_xla, which needs a specific version of torch: create "
                'a new environment and run `pip install -e ".[tpu]"` in it'
            )
        if trainer.accelerator not in ("auto", "tpu", "xla"):
            raise UserError(
                f"trainer.accelerator is {trainer.accelerator}, but trainer.strategy {trainer.strategy} is for XLA's "
                "devices: omit it"
            )
        trainer.accelerator = "xla"
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA would print a deprecation warning for each program
    if trainer.accelerator in ("tpu", "xla") and trainer.precision is None:
        # TPUs multiply float32 in bf16 anyway, and Lightning has no mixed precision for them.
        trainer.precision = "32-true"


AcceleratorRegistry.register("xla", XLADevices, "TPUs, or the CPU, with torch_xla", override=True)
strategies.register("xla", XLA, "one device, with torch_xla")
strategies.register("xla_spmd", XLASharded, "all devices, used by one process, with torch_xla")
