"""Quantization: a training run in, at its end a model of fewer bits, which it may have been trained for."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Optional

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lm_lightning.compression import recipes
from lm_lightning.compression.callbacks.after_training import compress_alone
from lm_lightning.compression.quantization import Rounding
from lm_lightning.errors import UserError
from lm_lightning.networks import by_rows, linear_layers
from lm_lightning.strategies.sharded import TensorParallel


class Quantization(Callback):
    """Quantizes the finished model of a run into `compressed/` of the run folder, as `compress` does.

    From `start` on, the network is trained for that: each layer computes with its weights, and where the recipe
    quantizes these, too, its inputs, rounded as they will be, while gradients pass as if nothing was (Jacob et al.,
    2018, arXiv:1712.05877). The weights themselves stay whole, in checkpoints and in `model/`, so that a resumed run
    goes on exactly and nothing is quantized twice; a validation after `start` is of the rounded network.

    Args:
        recipe: Of `compress`, such as `int8`, `nf4` or `width=0.5+onnx-int8`.
        start: Optimizer step from which the network is trained with rounding. Default: it is not.
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
        """The first step that is trained and validated as a quantized network."""
        return 0 if self.start is None else self.start + 1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.start is None or stage != "fit":
            return
        self.rounding = getattr(self.steps[0][0].way, "rounding", lambda: None)()
        if self.rounding is None or len(self.steps) > 1:
            can = [name for name, step in recipes.STEPS.items() if hasattr(step.way, "rounding")]
            raise UserError(
                f"the quantization cannot train for the recipe {self.recipe}: leave its start out, or take one of "
                + ", ".join(name for name in can if recipes.STEPS[name].way.rounding() is not None)  # type: ignore
            )
        if isinstance(trainer.strategy, TensorParallel):
            raise UserError(
                "quantization rounds whole weights: take --trainer.strategy ddp or fsdp2, or leave its start out"
            )
        if pl_module.adapter is not None:
            raise UserError(
                "quantization cannot round what model.adapter adds to a layer: omit its start, or use a quantized "
                "base, such as model.adapter.base nf4"
            )
        if pl_module.compile_body:
            raise UserError("quantization changes layers while they are trained: leave its start or model.compile out")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for step, value in self.steps:
            step.way.check(pl_module.network, value, self.modules)
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
        config = str(run / "config.yaml")  # named, so that classes of the user's are imported again
        flags = ["--recipe", self.recipe, "--modules", ",".join(self.modules), "--config", config]
        compress_alone(run, *flags, *(() if self.table else ("--measure", "false")))


def rounded(layer: nn.Linear, rounding: Rounding, inputs: Tensor) -> Tensor:
    """What a layer computes with rounded weights and inputs, whose gradients pass straight through."""
    if rounding.input is not None:
        inputs = straight_through(inputs, rounding.input)
    return F.linear(inputs, straight_through(by_rows(layer, layer.weight), rounding.weight), layer.bias)


def straight_through(values: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of values, in the backward pass the values themselves (Bengio et al., 2013, arXiv:1308.3432)."""
    with torch.no_grad(), torch.autocast(values.device.type, enabled=False):
        difference = function(values) - values
    return values + difference
