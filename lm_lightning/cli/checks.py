"""Checks of settings that Lightning and the parser accept although they fail later or do not have the meant effect."""

import contextlib
import dataclasses
import inspect
import os
import typing
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import LightningDataModule, Trainer

from lm_lightning import run as runs
from lm_lightning import strategies
from lm_lightning.callbacks.predictions import Predictions
from lm_lightning.checkpoints.callback import Checkpoints
from lm_lightning.cli.defaults import as_list
from lm_lightning.cli.options import CHECKPOINTS, TRAINER_DEFAULTS
from lm_lightning.errors import UserError
from lm_lightning.security import imports


def check(config: Any) -> None:
    """Refuses settings of the trainer that Lightning silently accepts or mishandles.

    Args:
        config: Options of a subcommand.

    Raises:
        UserError: Names the option, its value and what to use instead.
    """
    targets = {
        "trainer": Trainer,
        "best": Checkpoints,
        "last": Checkpoints,
        "predictions": Predictions,
        "model": None,
        "data": None,
    }
    for name, target in targets.items():
        if not hasattr(config[name], "items"):
            raise UserError(f"{name} is {config[name]!r}, but must have options by name")
        refuse_null(config[name], name, target)
    if imports.locate(str(config.data.get("class_path"))) in (None, LightningDataModule):
        raise UserError("data has no class_path: give one, such as PretrainingData")
    trainer = config.trainer
    check_location(config)
    strategies.check_name(trainer.strategy)
    for name, value, least in (
        ("trainer.accumulate_grad_batches", trainer.accumulate_grad_batches, 1),
        ("trainer.gradient_clip_val", trainer.gradient_clip_val, 0),
        ("trainer.log_every_n_steps", trainer.log_every_n_steps, 1),
        ("seed_everything", config.seed_everything, 0),
    ):
        if value is not None and value < least:
            raise UserError(f"{name} is {value}, but must be {least} or more")
    if trainer.max_steps == 0 or trainer.max_steps < -1:
        raise UserError(f"trainer.max_steps is {trainer.max_steps}, but must be 1 or more, or -1 for no limit")
    if trainer.max_epochs is not None and (trainer.max_epochs == 0 or trainer.max_epochs < -1):
        raise UserError(f"trainer.max_epochs is {trainer.max_epochs}, but must be 1 or more, or -1 for no limit")
    if trainer.check_val_every_n_epoch is not None and trainer.check_val_every_n_epoch < 1:
        raise UserError(
            f"trainer.check_val_every_n_epoch is {trainer.check_val_every_n_epoch}, but must be 1 or more, or null to "
            "count trainer.val_check_interval over all epochs; --trainer.limit_val_batches 0 trains without validation"
        )
    if trainer.limit_train_batches == 0:
        raise UserError("trainer.limit_train_batches is 0, but must be 1 or more, or a share of the data (0.1)")
    if trainer.val_check_interval == 0:
        raise UserError("trainer.val_check_interval is 0, but must be 1 or more steps, or a share of the epoch (0.5)")
    check_slurm()


def check_slurm() -> None:
    """Refuses to start in a SLURM allocation without srun, as Lightning needs environment variables that srun sets."""
    if "TORCHELASTIC_RUN_ID" in os.environ or not SLURMEnvironment.detect():
        return
    if missing := [name for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID") if name not in os.environ]:
        raise UserError(
            f"SLURM_NTASKS is set, but {missing[0]} is not, so srun did not start this process: start it with srun, "
            "or run it without SLURM by `env -u SLURM_NTASKS python -m lm_lightning ...`"
        )


def check_location(config: Any) -> None:
    """Refuses options that would write files of a run outside its run folder."""
    loggers = as_list(config.trainer.logger)
    own_files = [own for own in loggers if str(getattr(own, "class_path", "")).endswith("MetricsFile")]
    for name, value, default in [
        ("trainer.default_root_dir", config.trainer.default_root_dir, TRAINER_DEFAULTS["default_root_dir"]),
        ("best.dirpath", config.best.dirpath, CHECKPOINTS["dirpath"]),
        ("last.dirpath", config.last.dirpath, CHECKPOINTS["dirpath"]),
        *(("save_dir of MetricsFile", logger.init_args.save_dir, runs.PLACEHOLDER) for logger in own_files),
    ]:
        if str(value) != default:
            raise UserError(
                f"{name} is {value}, but all files of a run are in one folder, <runs_dir>/<name>/<time>: remove this "
                "option, and set the folder of all runs with --runs_dir"
            )


def refuse_null(value: Any, name: str, target: Any) -> None:
    """Refuses options that are null although their types do not include None; the parser accepts them.

    Args:
        value: Nested options by name.
        name: The name of the section, for messages.
        target: The class that has these options; None if their `class_path` names it.
    """
    if "class_path" in value:
        target, value = imports.locate(value["class_path"]), value.get("init_args") or {}
    hints: dict[str, Any] = {}
    # `**options` are passed on to a base class.
    for base in reversed(inspect.getmro(target)) if inspect.isclass(target) else ():
        with contextlib.suppress(NameError):  # types that are imported for type checkers only
            hints |= typing.get_type_hints(base.__init__)  # type: ignore[misc]
    for key, option in (value if isinstance(value, dict) else vars(value)).items():
        hint = hints.get(key)
        if option is None and hint not in (None, Any) and type(None) not in typing.get_args(hint):
            raise UserError(f"{name}.{key} is null, but must have a value: omit the option to use its default")
        if hasattr(option, "items"):  # settings of a network may be null
            refuse_null(option, f"{name}.{key}", hint if dataclasses.is_dataclass(hint) else None)
