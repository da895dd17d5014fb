"""Default values that depend on other settings, on the machine or on the run."""

from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from lm_lightning import features
from lm_lightning import run as runs
from lm_lightning.compat.torch import cpu_computes_bf16
from lm_lightning.security import imports


def experiment_name(config: Any) -> str:
    """The name of the experiment; by default, the name of the first config file."""
    return config.name or (Path(config.config[0]).stem if config.config else "run")


def complete(config: Any, subcommand: str, defaults: Any) -> None:
    """Sets options that have no value yet, and options whose values follow from others.

    Args:
        config: Options of the subcommand; changed in place.
        subcommand: `fit`, `validate`, `test` or `predict`.
        defaults: The defaults of all options.
    """
    if config.best.monitor is None:
        model_class: Any = imports.locate(str(config.model.class_path))
        config.best.monitor = f"val/{model_class.main_metric(config.data.get('init_args') or {})}"
    config.trainer.logger = loggers(config.trainer.logger, subcommand, defaults.trainer.logger)
    model, data = (config[part].get("init_args") or Namespace() for part in ("model", "data"))
    pretrained = model.get("pretrained")
    same_tokens = "tables" in data or subcommand != "fit"  # pretraining may train a new tokenizer
    if pretrained and same_tokens and hasattr(data.get("tokenizer"), "path") and data.tokenizer.path is None:
        data.tokenizer.path = runs.pretrained_name(pretrained, "tokenizer")
    config.weights_only = True  # nothing that a checkpoint contains is executed
    for complete_settings in features.trainer_settings():
        complete_settings(config.trainer)
    if config.trainer.precision is None:
        config.trainer.precision = best_precision(config.trainer.accelerator)


def loggers(chosen: Any, subcommand: str, default: Any) -> Any:
    """The loggers of a run: a list, or False for none."""
    found = as_list(default if chosen is True else chosen)
    if subcommand != "fit":  # most loggers would continue the files of the training
        found = [logger for logger in found if getattr(imports.locate(logger.class_path), "logs_evaluations", False)]
    return found or False


def count_micro_batches(trainer: Any) -> None:
    """Converts `val_check_interval` from optimizer steps, as in all our options, to Lightning's micro-batches."""
    interval = trainer.val_check_interval
    if isinstance(interval, int) or (isinstance(interval, float) and interval > 1):
        trainer.val_check_interval = interval * trainer.accumulate_grad_batches


def as_list(value: Any) -> list:
    """Converts a value to a list, where Lightning accepts one item, a list of items, null or false."""
    return list(value) if isinstance(value, (list, tuple)) else [value] if value else []


def fill_in(config: Any, run: str) -> Any:
    """Replaces `<run>` in the values of options by the run folder."""
    if isinstance(config, str):
        return config.replace(runs.PLACEHOLDER, run)
    if isinstance(config, list):
        return [fill_in(value, run) for value in config]
    if isinstance(config, dict):
        return {key: fill_in(value, run) for key, value in config.items()}
    if hasattr(config, "items"):  # jsonargparse's Namespace
        for key, value in config.items(branches=False):
            config[key] = fill_in(value, run)
    return config


def best_precision(accelerator: Any) -> str:
    """bf16 with float32 weights where the machine computes it natively, else float32."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        native = False  # autocast to bf16 needs a recent macOS: ask for it with --trainer.precision bf16-mixed
    else:
        native = cpu_computes_bf16()
    return "bf16-mixed" if native else "32-true"
