"""Matrix products in 8-bit floating point, by torchao."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lm_lightning.cuda.changes import add_change
from lm_lightning.errors import UserError, package
from lm_lightning.linear_layers.blocks import linear_layers
from lm_lightning.linear_layers.quantized import refuse_skipped
from lm_lightning.strategies.capabilities import capabilities

CAPABILITY = (8, 9)  # of the first NVIDIA GPUs with products of 8-bit numbers
MULTIPLE = 16  # of the sizes of such matrices


class Float8(Callback):
    """Trains with matrix products in 8-bit floating point, forward and backward, for the linear layers of the blocks.

    Weights, gradients and the optimizer's state keep their precision; inputs, weights and gradients are scaled and
    rounded for each product. Checkpoints and exports are therefore those of any network. Validations during training
    use such products, too; `validate RUN` and other commands do not. It is not for adapters and tensor parallelism.

    Args:
        recipe: How torchao scales the numbers. `tensorwise`: with one factor for each matrix, the fastest. `rowwise`:
            with one for each row. `rowwise_with_gw_hp`: as `rowwise`, but without rounding for the gradients of the
            weights, the most exact.
        modules: Patterns of the names of linear layers, such as `*mlp*`. Default: all linear layers of the blocks.
        emulate: Whether to round the numbers, but to compute the products as usual: slower, but on any device.
    """

    def __init__(
        self,
        recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise",
        modules: Sequence[str] = (),
        emulate: bool = False,
    ) -> None:
        self.recipe, self.modules, self.emulate = recipe, modules, emulate

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        package("torchao.float8", "the callback Float8", "cuda")
        refuse_device(trainer.strategy.root_device, str(trainer.precision), self.emulate)
        if pl_module.adapter is not None:
            raise UserError("the callback Float8 does not support model.adapter: omit one of the two")
        if capabilities(trainer.strategy).splits_matrices:
            raise UserError("the callback Float8 does not support tensor parallelism: use --trainer.strategy ddp")
        add_change(pl_module, "Float8", partial(self.convert, pl_module))

    def convert(self, pl_module: LightningModule, network: Any) -> None:
        """Replaces the linear layers of a network.

        Raises:
            UserError: If one of them cannot be replaced.
        """
        float8 = package("torchao.float8", "the callback Float8", "cuda")
        layers = linear_layers(network, self.modules)
        skipped = [name for name, layer in layers.items() if not suits(layer)]
        remedy = (
            f"use a network with layers of class Linear whose sizes are multiples of {MULTIPLE}, such as a Llama, or "
            "select other layers with modules"
        )
        refuse_skipped(network, layers, skipped, "Float8", remedy)
        recipe = float8.Float8LinearConfig.from_recipe_name(self.recipe)
        # Padding has no effect if the number of tokens of a batch is a multiple of 16 already.
        config = dataclasses.replace(recipe, emulate=self.emulate, pad_inner_dim=True)
        float8.convert_to_float8_training(network, config=config, module_filter_fn=lambda _, name: name in layers)
        slow = "" if pl_module.compile_body or self.emulate else "; this is slow without --model.compile true"
        pl_module.print(f"float8: {len(layers)} linear layers ({self.recipe}){slow}")


def suits(layer: nn.Module) -> bool:
    """Whether a layer can be replaced."""
    return type(layer) is nn.Linear and not (layer.in_features % MULTIPLE or layer.out_features % MULTIPLE)


def refuse_device(device: torch.device, precision: str, emulate: bool) -> None:
    """Refuses devices that cannot multiply 8-bit numbers, and precisions for which torchao was not made.

    Raises:
        UserError: Names the device or the precision.
    """
    needed, found = "bf16-mixed", device.type
    if device.type == "cuda" and not emulate:
        major, minor = torch.cuda.get_device_capability(device)
        found = f"{torch.cuda.get_device_name(device)}, {major}.{minor}"
        known = torch.version.cuda is not None and (major, minor) >= CAPABILITY
    else:
        known = emulate
        needed = precision if device.type == "cuda" else "32-true"  # torchao reads the autocast of GPUs only
    if not known:
        raise UserError(
            f"the callback Float8 needs an NVIDIA GPU of compute capability {'.'.join(map(str, CAPABILITY))} or more, "
            f"but this run uses {found}: omit it, or set its option emulate"
        )
    if precision != needed:
        raise UserError(
            f"the callback Float8 needs --trainer.precision {needed} on this device, but this run has {precision}"
        )
