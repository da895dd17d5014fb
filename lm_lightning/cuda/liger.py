"""Kernels of Liger for the norms, feed-forward layers and rotary positions of a network."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lm_lightning.cuda.changes import add_change
from lm_lightning.cuda.compat import apply_liger, liger_types
from lm_lightning.errors import UserError
from lm_lightning.strategies.capabilities import capabilities


class LigerKernels(Callback):
    """Trains with the Triton kernels of Liger (Hsu et al., 2024, arXiv:2410.10989), which need less memory and time.

    They compute the same norms, feed-forward layers and rotary positions. The loss is this project's own, which does
    not keep the logits either. All networks of the same type in the process use the kernels for rotary positions.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        known = liger_types()
        if (device := trainer.strategy.root_device.type) != "cuda":
            raise UserError(f"the callback LigerKernels needs a GPU with CUDA, but this run uses {device}: omit it")
        if capabilities(trainer.strategy).splits_matrices:
            raise UserError("the callback LigerKernels does not support tensor parallelism: use --trainer.strategy ddp")

        def change(network: Any) -> None:
            if (model_type := network.config.model_type) not in known:
                raise UserError(
                    f"Liger has no kernels for networks of type {model_type}: omit the callback LigerKernels, or use "
                    f"one of {', '.join(known)}"
                )
            apply_liger(network)
            changed = sum("forward" in vars(module) for module in network.modules())
            pl_module.print(f"liger: {changed} layers of {type(network).__name__} use other kernels")

        add_change(pl_module, "LigerKernels", change)
