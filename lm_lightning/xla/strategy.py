"""XLA: training steps flow in, and out flow programs that `torch_xla` compiles once, for TPUs.

On an XLA device PyTorch only notes what it is asked for. At the end of a micro-batch or an optimizer step the notes are
a program, which is compiled unless there has been the same, of the same shapes, before. To ask for a value in between
cuts programs in two and makes the host wait, so nobody does, except where a value is logged.

The environment variable `PJRT_DEVICE` says which devices: `TPU`, or `CPU`, on which all of this is tested; of a CPU,
`CPU_NUM_DEVICES=2` makes two devices.
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

STRATEGIES = ("xla", "xla_spmd", f"{__name__}.XLA", f"{__name__}.XLASharded")  # as trainer.strategy names them


class XLADevices(XLAAccelerator):
    """Lightning's accelerator for TPUs, widened to all devices of `torch_xla`; how many, the strategy decides."""

    @staticmethod
    def parse_devices(devices: Any) -> int:
        if devices not in (1, "1"):
            raise UserError(
                f"trainer.devices is {devices}, but xla takes one device and xla_spmd all that there are: leave it out "
                "(how many a CPU has, the environment variable CPU_NUM_DEVICES says)"
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
    """One device, through `torch_xla`."""

    quantized_weights = False
    lazy = True
    checkpoint_io = SingleDeviceStrategy.checkpoint_io  # any, where Lightning takes only one that fetches the tensors

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
        return torch.device("cpu")  # where new weights are the same as without XLA, and need no program

    def batch_to_device(self, batch: Any, device: Optional[torch.device] = None, dataloader_idx: int = 0) -> Any:
        import torch_xla

        torch_xla.sync()  # the micro-batch before is a program, not a part of a longer one
        return super().batch_to_device(batch, device, dataloader_idx)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        import torch_xla

        output = super().validation_step(*args, **kwargs)
        torch_xla.sync()  # or each metric would be a program that computes the last batch again
        return output

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        import torch_xla

        output = super().test_step(*args, **kwargs)
        torch_xla.sync()
        return output

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        import torch_xla

        torch_xla.manual_seed(torch.initial_seed())  # XLA draws from a generator of its own; the module seeds torch's
        return super().training_step(*args, **kwargs)

    def throughput_metrics(self) -> dict[str, float]:
        """`train/compilations`, the programs compiled so far: if these grow, something changes its shape."""
        from torch_xla.debug import metrics

        data = metrics.metric_data("CompileTime")
        return {"train/compilations": data[0] if data else 0}


class XLASharded(XLA):
    """All devices of a machine, driven by one process (SPMD: single program, multiple data), through `torch_xla`.

    The samples of a batch are split over the devices: `data.batch_size` counts those of all devices, and must be a
    multiple of their number. What the devices have to tell each other, XLA finds out (Xu et al., 2021, GSPMD,
    arXiv:2105.04663).

    Args:
        shard_parameters: Whether each device keeps a part of the parameters and of the optimizer's state (fully
            sharded), not a copy of all.
    """

    def __init__(self, shard_parameters: bool = True) -> None:
        from torch_xla import runtime

        runtime.use_spmd()  # comes before the first tensor
        super().__init__()
        self.shard_parameters = shard_parameters

    def setup(self, trainer: Trainer) -> None:
        from torch_xla import runtime
        from torch_xla.distributed import spmd

        self.mesh, batch_size = spmd.get_1d_mesh("devices"), trainer.datamodule.batch_size
        if runtime.process_count() > 1:
            raise UserError("xla_spmd drives the devices of one machine, not of several: start it on one alone")
        if batch_size % self.mesh.size():
            raise UserError(
                f"data.batch_size is {batch_size}, which cannot be split over {self.mesh.size()} devices: make it a "
                "multiple of that"
            )
        super().setup(trainer)

    def batch_to_device(self, batch: Any, device: Optional[torch.device] = None, dataloader_idx: int = 0) -> Any:
        batch = super().batch_to_device(batch, device, dataloader_idx)
        return apply_to_collection(batch, Tensor, self.split, dimensions=(0,))

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if self.shard_parameters:
            # What is computed from these, as gradients and the optimizer's state, is split alike.
            for parameter in model.parameters():
                self.split(parameter, dimensions=by_length(parameter))
        return model

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        super().load_optimizer_state_dict(checkpoint)  # from which nothing was computed yet
        if self.shard_parameters:
            for optimizer in self.optimizers:
                for parameter, state in optimizer.state.items():
                    for tensor in state.values():
                        if isinstance(tensor, Tensor) and tensor.shape == parameter.shape:
                            self.split(tensor, dimensions=by_length(tensor))

    def split(self, tensor: Tensor, dimensions: Iterable[int]) -> Tensor:
        """Splits a tensor over the devices, in place: along the first of some dimensions that divides, if any."""
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
    """Sets the accelerator that these strategies need, and the precision that XLA's devices have by default.

    Args:
        trainer: The trainer's settings.

    Raises:
        UserError: If there is no torch_xla, or another accelerator was asked for.
    """
    if getattr(trainer.strategy, "class_path", trainer.strategy) in STRATEGIES:
        if importlib.util.find_spec("torch_xla") is None:
            raise UserError(
                f"trainer.strategy {trainer.strategy} needs torch_xla, which brings its own torch: make a new "
                'environment and `pip install -e ".[tpu]"` there'
            )
        if trainer.accelerator not in ("auto", "tpu", "xla"):
            raise UserError(
                f"trainer.accelerator is {trainer.accelerator}, but trainer.strategy {trainer.strategy} is for XLA's "
                "devices: omit it"
            )
        trainer.accelerator = "xla"
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA would warn of its own future with each program
    if trainer.accelerator in ("tpu", "xla") and trainer.precision is None:
        # float32 is multiplied in bf16 there anyway, and Lightning has no mixed precision for it
        trainer.precision = "32-true"


AcceleratorRegistry.register("xla", XLADevices, "TPUs, or the CPU, through torch_xla", override=True)
strategies.register("xla", XLA, "one device, through torch_xla")
strategies.register("xla_spmd", XLASharded, "all devices, driven by one process, through torch_xla")
