"""The command `compress` at the end of a training run."""

from pathlib import Path

from lm_lightning.errors import UserError
from lm_lightning.processes import run_alone


def compress_alone(model: Path, *flags: str) -> None:
    """Runs `compress` in a process of its own.

    Args:
        model: See `compress`.
        flags: Of the command.

    Raises:
        UserError: If it fails; what it has printed gives the reason.
    """
    arguments = ["compress", str(model), *flags]
    if run_alone(arguments):
        raise UserError(
            "the model is trained and exported, but could not be compressed or measured; to try again: "
            f"python -m lm_lightning {' '.join(arguments)}"
        )
