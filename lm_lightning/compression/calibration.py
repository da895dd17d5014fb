"""Calibration: a run's training batches through a finished model, to learn what its layers are given."""

import contextlib
import io
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lm_lightning.networks import blocks, linear_layers


class Inputs(NamedTuple):
    """What layers are given.

    Attributes:
        norms: Of each input of each linear layer of the blocks, by its name: the root of its mean square, (inputs,).
        changes: How far each block turns what it is given, in the blocks' order: 1 - cosine, averaged over tokens
            (Men et al., 2024, arXiv:2403.03853).
    """

    norms: dict[str, Tensor]
    changes: list[float]


Calibration = Callable[[Path], Inputs]  # of a `from_pretrained` folder


class Measuring(Callback):
    """Passes some training batches through the network of a `validate`, and measures.

    Args:
        batches: How many.
    """

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Adds up values of tokens, (N, ...)."""
        self.sums[name] = self.sums.get(name, 0) + values.sum(0)
        self.counts[name] = self.counts.get(name, 0) + len(values)

    @torch.no_grad()
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        hooks: list[Any] = []

        def of_layer(name: str) -> Any:
            return lambda layer, inputs: self.add(name, inputs[0].float().flatten(0, -2).square())

        def of_block(name: str) -> Any:
            def hook(block: nn.Module, inputs: tuple, output: Any) -> None:
                given, made = inputs[0], output[0] if isinstance(output, tuple) else output
                self.add(name, 1 - torch.cosine_similarity(given.float(), made.float(), dim=-1).flatten())

            return hook

        for name, layer in linear_layers(pl_module.network).items():
            hooks.append(layer.register_forward_pre_hook(of_layer(name)))
        for number, block in enumerate(blocks(pl_module.network)):
            hooks.append(block.register_forward_hook(of_block(f"block {number}")))
        data = trainer.datamodule
        data.setup("fit")
        for batch in itertools.islice(data.train_dataloader(), self.batches):
            pl_module.loss(trainer.strategy.batch_to_device(batch))
        for hook in hooks:
            hook.remove()

    def result(self) -> Inputs:
        """What was measured."""
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        changes = [means.pop(name).item() for name in list(means) if name.startswith("block ")]
        return Inputs({name: mean.sqrt().cpu() for name, mean in means.items()}, changes)


def run(settings: Path, pretrained: Path, callbacks: list[Callback], *flags: str, device: str = "cpu") -> Any:
    """Runs a `validate` of a run's config with other weights, in this process, and says nothing of it.

    Args:
        settings: Config file of the run.
        pretrained: Folder of the weights.
        callbacks: Besides those of every run.
        flags: More of the command line.
        device: `cpu` or `cuda`.

    Returns:
        The `Trainer`.
    """
    from lm_lightning.cli.app import CLI

    with tempfile.TemporaryDirectory() as runs, contextlib.redirect_stdout(io.StringIO()):
        own = ["--config", str(settings), "--runs_dir", runs, "--name", "compressed", "--ckpt_path", "null"]
        weights = ["--model.network", "null", "--model.pretrained", str(pretrained)]
        weights += ["--model.compile", "false", "--model.adapter", "null"]
        plain = ["--trainer.accelerator", device, "--trainer.devices", "1", "--trainer.strategy", "auto"]
        plain += ["--trainer.precision", "32-true", "--trainer.callbacks", "null"]
        return CLI(["validate", *own, *weights, *plain, *flags], callbacks).trainer


def calibrate(settings: Path, folder: Path, batches: int) -> Inputs:
    """Measures what the layers of a folder's network are given by a run's training batches.

    Args:
        settings: Config file of the run.
        folder: `from_pretrained` folder.
        batches: How many training batches, the first ones of the run.
    """
    measuring = Measuring(batches)
    run(settings, folder, [measuring], "--trainer.limit_val_batches", "1")
    return measuring.result()
