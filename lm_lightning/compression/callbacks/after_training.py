"""Runs the command `compress` at the end of a training run."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lm_lightning.errors import UserError
from lm_lightning.processes import RUN_FOLDER

# Prefixes of the environment variables that make a process one of the processes of a training run.
DISTRIBUTED_VARIABLES = (
    "RANK",
    "LOCAL_",
    "WORLD_SIZE",
    "GROUP_",
    "ROLE_",
    "NODE_RANK",
    "MASTER_",
    "TORCHELASTIC_",
    "SLURM_",
)


def compress_alone(model: Path, *flags: str) -> None:
    """Runs `compress` in a process of its own.

    Args:
        model: See `compress`.
        flags: Arguments of the command.

    Raises:
        UserError: If the command fails; its output has the reason.
    """
    arguments = ["compress", str(model), *flags]
    if run_alone(arguments):
        raise UserError(
            "the model is trained and exported, but could not be compressed or measured: to try again, run "
            f"`python -m lm_lightning {' '.join(arguments)}`"
        )


def run_alone(arguments: Sequence[str]) -> int:
    """Runs a command of this project in a process of its own, which does not become part of a surrounding training run.

    Args:
        arguments: The command and its arguments.

    Returns:
        Its exit status. Its output goes to the console.
    """
    environment = {
        n: value for n, value in os.environ.items() if not n.startswith((*DISTRIBUTED_VARIABLES, RUN_FOLDER))
    }
    return subprocess.run([sys.executable, "-m", "lm_lightning", *arguments], env=environment, check=False).returncode
