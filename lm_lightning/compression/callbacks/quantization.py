"""Quantizes the model of a training run at its end, optionally with quantization-aware training."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Optional

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lm_lightning.compression import recipes
from lm_lightning.compression.callbacks.after_training import compress_alone
from lm_lightning.compression.quantization import Rounding
from lm_lightning.errors import UserError
from lm_lightning.linear_layers.blocks import by_rows, linear_layers
from lm_lightning.strategies.capabilities import capabilities


class Quantization(Callback):
    """Quantizes the model at the end of a run, like `compress`, and writes it to `compressed/` in the run folder.

    From step `start`, quantization-aware training is used: each layer computes with rounded weights and, if the recipe
    quantizes inputs, with rounded inputs, while the backward pass ignores the rounding (Jacob et al., 2018,
    arXiv:1712.05877). In checkpoints and in `model/`, the weights keep their precision, so that a resumed run continues
    exactly and nothing is quantized twice. Validations after `start` evaluate the rounded network.

    Args:
        recipe: Recipe of `compress`, such as `int8`, `nf4` or `width=0.5+onnx-int8`.
        start: Optimizer step from which the network is trained with rounding. Default: never.
        modules: Patterns of the names of linear layers of the blocks, such as `*mlp*`. Default: all of them.
        table: Whether to measure size, speed, loss and metrics before and after, see `compress`.
    """

    def __init__(
        self, recipe: str = "int8", start: Optional[int] = None, modules: Sequence[str] = (), table: bool = True
    ) -> None:
        self.steps = recipes.steps_of(recipe)
        if start is not None and start < 0:
            raise UserError(f"the quantization's start is {start}, but must be 0 or more")
        self.recipe, self.start, self.modules, self.table = recipe, start, modules, table
        self.layers: dict[str, nn.Linear] = {}
        self.rounding: Optional[Rounding] = None

    @property
    def complete_from(self) -> int:
        """The first step after which validations evaluate the rounded network."""
        return 0 if self.start is None else self.start + 1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.start is None or stage != "fit":
            return
        self.rounding = recipes.rounding_of(self.recipe)
        if self.rounding is None:
            raise UserError(
                f"the quantization cannot train for the recipe {self.recipe}: omit its start, or use one of "
                + ", ".join(name for name in recipes.STEPS if recipes.rounding_of(name) is not None)
            )
        if capabilities(trainer.strategy).splits_matrices:
            raise UserError(
                "a quantization with a start needs the complete weights of a layer in each process: use "
                "--trainer.strategy ddp or fsdp2, or omit its start"
            )
        if pl_module.adapter is not None:
            raise UserError(
                "quantization cannot round the output of model.adapter: omit its start, or use a quantized base, such "
                "as model.adapter.base nf4"
            )
        if pl_module.compile_body:
            raise UserError("quantization with a start cannot be combined with model.compile: omit one of the two")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for step, value in self.steps:
            step.method.check(pl_module.network, value, self.modules)
        if self.start is not None:
            refuse_replaced(linear_layers(pl_module.network, self.modules))
        if self.start is not None and self.start >= pl_module.total_steps():
            raise UserError(
                f"the quantization starts at step {self.start}, but the run ends at step "
                f"{pl_module.total_steps():.0f}: lower its start"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if self.rounding is None or self.layers or trainer.global_step < (self.start or 0):
            return
        self.layers = linear_layers(pl_module.network, self.modules)
        for layer in self.layers.values():
            layer.forward = partial(rounded, layer, self.rounding)  # type: ignore[method-assign]
        pl_module.print(f"quantization: trained for {self.recipe} from step {trainer.global_step:,} on")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for layer in self.layers.values():
            del layer.forward
        self.layers = {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run = Path(trainer.default_root_dir)
        if not trainer.is_global_zero or trainer.fast_dev_run or not (run / "model").exists():
            return
        config = str(run / "config.yaml")  # given explicitly, so that the user's own classes are imported
        flags = ["--recipe", self.recipe, "--modules", ",".join(self.modules), "--config", config]
        compress_alone(run, *flags, *(() if self.table else ("--measure", "false")))


def refuse_replaced(layers: dict[str, nn.Linear]) -> None:
    """Refuses layers that another callback has replaced, as their products would be replaced again.

    Raises:
        UserError: Names the first such layer.
    """
    if replaced := [name for name, layer in layers.items() if type(layer) not in (nn.Linear, Conv1D)]:
        raise UserError(
            f"a quantization with a start cannot round {replaced[0]}, whose class is "
            f"{type(layers[replaced[0]]).__name__}: omit its start, or the callback that replaces layers"
        )


def rounded(layer: nn.Linear, rounding: Rounding, inputs: Tensor) -> Tensor:
    """The output of a layer with rounded weights and inputs; the backward pass ignores the rounding."""
    if rounding.input is not None:
        inputs = straight_through(inputs, rounding.input)
    return F.linear(inputs, straight_through(by_rows(layer, layer.weight), rounding.weight), layer.bias)


def straight_through(values: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Applies a function in the forward pass only: a straight-through estimator (Bengio et al., 2013)."""
    with torch.no_grad(), torch.autocast(values.device.type, enabled=False):
        difference = function(values) - values
    return values + difference
