"""Environment: what a result depends on besides config and data; saved as environment.json in the run folder."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, Optional

import lightning.pytorch
import torch
import transformers

import lm_lightning
from lm_lightning.security.redaction import redact_arguments


def environment() -> dict[str, Any]:
    """Command, versions, hardware and the git commit of the working directory, as JSON-serializable values."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "command": redact_arguments(sys.argv),
        "git": git(),
        "lm_lightning": lm_lightning.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.pytorch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": memory(),
        "gpus": [f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB" for gpu in gpus],
    }


def git() -> Optional[dict[str, Any]]:
    """The `commit` of the working directory and whether any of its files `changed`; None outside of a repository."""
    try:
        commit, changes = (
            subprocess.run(
                ["git", *args], capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=True
            ).stdout.strip()
            for args in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):  # no git, no repository, no commit yet
        return None
    return {"commit": commit, "changed": bool(changes)}


def cpu() -> str:
    """The name of the processor."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):  # not on ARM
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def memory() -> Optional[str]:
    """The memory of the machine; None on Windows."""
    if not hasattr(os, "sysconf"):
        return None
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
