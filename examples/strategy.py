"""A strategy: DDP that sends gradients in half precision, for slow networks between machines."""

from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook


class HalfPrecisionDDP(DDPStrategy):
    """Averages gradients in float16, which halves what the processes send to each other.

    Args:
        options: Those of Lightning's `DDPStrategy`.
    """

    # What the rest of the project asks of a strategy, see lm_lightning/strategies/capabilities.py
    averages_gradients = True

    def __init__(self, **options: Any) -> None:
        super().__init__(ddp_comm_hook=fp16_compress_hook, **options)
