"""Evaluation of compressed models: runs `validate` in this process with the config of a run and other weights."""

import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from transformers.utils import ModelOutput

from lm_lightning.compression.calibration import Calibrate, Statistics
from lm_lightning.compression.formats import Runner, runner


def validate(settings: Path, pretrained: Path, callbacks: list[Callback], *flags: str, device: str = "cpu") -> Any:
    """Runs a `validate` without its output.

    Args:
        settings: Config file of the run.
        pretrained: `from_pretrained` folder of the weights.
        callbacks: Callbacks in addition to those of every run.
        flags: Additional arguments of the command line.
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


def metrics(settings: Path, source: Path, folder: Path, device: str) -> dict[str, float]:
    """The metrics of a run's validation split, by their names, such as `val/loss`.

    Args:
        settings: Config file of the run.
        source: `from_pretrained` folder of the uncompressed model.
        folder: Folder of the model, which has weights, or a program that replaces the network of `source`.
        device: `cpu` or `cuda`; programs run on the CPU.
    """
    program = runner(folder)
    if program is None:
        trainer = validate(settings, folder, [], device=device)
    else:
        trainer = validate(settings, source, [RunProgram(program)])
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def calibrate(settings: Path, folder: Path, batches: int) -> Statistics:
    """Measures a network on the first training batches of a run.

    Args:
        settings: Config file of the run.
        folder: `from_pretrained` folder of the network.
        batches: Number of training batches.
    """
    callback = Calibrate(batches)
    validate(settings, folder, [callback], "--trainer.limit_val_batches", "1")
    return callback.statistics()


class RunProgram(Callback):
    """Replaces the forward pass of the network by a program.

    Args:
        program: See `formats.runner`.
    """

    def __init__(self, program: Runner) -> None:
        self.program = program

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def forward(**inputs: Any) -> ModelOutput:
            inputs.pop("use_cache", None)
            return ModelOutput(self.program(**inputs))  # type: ignore[misc]

        pl_module.has_linear_head = False
        pl_module.network.forward = forward
