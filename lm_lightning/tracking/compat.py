"""Lightning's WandbLogger: when and how it starts a run of W&B."""

from typing import Any

from lightning.pytorch.loggers import WandbLogger


def init_options(logger: WandbLogger) -> dict[str, Any]:
    """The arguments that the logger will call `wandb.init` with, which may be changed.

    Alternative: to pass them to the logger, but the id, the mode and the settings are known only when the run starts.
    """
    return logger._wandb_init


def is_started(logger: WandbLogger) -> bool:
    """Whether the logger has a run of W&B, in this process or in the one that has started it (ddp_spawn).

    Alternative: `experiment`, which starts one. (`_attach_id` is there after the logger was copied to a process.)
    """
    return current_run(logger) is not None or getattr(logger, "_attach_id", None) is not None


def current_run(logger: WandbLogger) -> Any:
    """The run of W&B, None if none was started in this process. Alternative: `experiment`, which starts one."""
    return logger._experiment


def forget_run(logger: WandbLogger) -> None:
    """Makes the logger start a new run when it is used again. Alternative: none."""
    logger._experiment = None
