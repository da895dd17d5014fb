"""Strategies: how a run is spread over devices, by the names that `--trainer.strategy` takes."""

from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from lm_lightning.strategies.xla import XLA, XLADevices, XLASharded

AcceleratorRegistry.register("xla", XLADevices, "TPUs, or the CPU, through torch_xla", override=True)
StrategyRegistry.register("xla", XLA, "One device, through torch_xla", override=True)
StrategyRegistry.register("xla_spmd", XLASharded, "All devices by one process, through torch_xla", override=True)
