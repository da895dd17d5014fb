"""Lightning's WandbLogger: when and how it starts a W&B run."""

from typing import Any

from lightning.pytorch.loggers import WandbLogger


def init_options(logger: WandbLogger) -> dict[str, Any]:
    """The arguments with which the logger will call `wandb.init`, which may be changed.

    Alternative: passing them to the logger, but the ID, the mode and the settings are unknown until the run starts.
    """
    return logger._wandb_init


def is_started(logger: WandbLogger) -> bool:
    """Whether the logger has a W&B run, in this process or in the process that started this one (ddp_spawn).

    Alternative: `experiment`, which starts a run. (`_attach_id` exists after the logger was copied to a process.)
    """
    return current_run(logger) is not None or getattr(logger, "_attach_id", None) is not None


def current_run(logger: WandbLogger) -> Any:
    """The W&B run; None if none was started in this process. Alternative: `experiment`, which starts one."""
    return logger._experiment


def forget_run(logger: WandbLogger) -> None:
    """Makes the logger start a new run when it is used again. Alternative: none."""
    logger._experiment = None
