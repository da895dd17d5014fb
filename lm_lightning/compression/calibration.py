"""Calibration: measures the inputs of a trained model's layers with training batches."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lm_lightning.compression.importance import observe_blocks, observe_inputs
from lm_lightning.linear_layers.blocks import linear_layers
from lm_lightning.networks import blocks


class Statistics(NamedTuple):
    """Measurements of forward passes through a network.

    Attributes:
        norms: For each linear layer of the blocks, by its name, the root mean square of each input, (inputs,) float32.
        changes: How much each block changes its input, in the order of the blocks: 1 - cosine similarity, averaged over
            tokens.
    """

    norms: dict[str, Tensor]
    changes: list[float]


Calibration = Callable[[Path], Statistics]  # measures the network of a `from_pretrained` folder


class Calibrate(Callback):
    """Passes the first training batches through the network in `validate`, and measures.

    Args:
        batches: Number of batches.
    """

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, total: Tensor, count: int) -> None:
        """Adds a sum over tokens, and their number."""
        self.sums[name] = self.sums.get(name, 0) + total
        self.counts[name] = self.counts.get(name, 0) + count

    @torch.no_grad()
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network = pl_module.network
        hooks = observe_inputs(linear_layers(network), self.add) + observe_blocks(blocks(network), self.add)
        data = trainer.datamodule
        data.setup("fit")
        for batch in itertools.islice(data.train_dataloader(), self.batches):
            pl_module.loss(trainer.strategy.batch_to_device(batch))
        for hook in hooks:
            hook.remove()

    def statistics(self) -> Statistics:
        """The measurements."""
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        changes = [means.pop(name).item() for name in list(means) if name.startswith("block ")]
        return Statistics({name: mean.sqrt().cpu() for name, mean in means.items()}, changes)
