"""A strategy: DDP that sends gradients in float16, for slow connections between machines."""

from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook


class HalfPrecisionDDP(DDPStrategy):
    """Averages gradients in float16, so that processes send half as many bytes to each other.

    Args:
        options: Options of Lightning's `DDPStrategy`.
    """

    # A capability, see lm_lightning/strategies/capabilities.py
    averages_gradients = True

    def __init__(self, **options: Any) -> None:
        super().__init__(ddp_comm_hook=fp16_compress_hook, **options)
