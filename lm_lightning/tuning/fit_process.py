"""Runs `fit` in separate processes, and returns its settings, its metrics, or the reason why it failed."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Optional

from lm_lightning import yaml_text
from lm_lightning.callbacks.metrics_reader import read_metrics
from lm_lightning.errors import UserError
from lm_lightning.processes import free_ports, kill_with_parent


def read_settings(fit_flags: list[str], folder: Path, timeout: float = 600) -> dict:
    """The complete settings that follow from a config and flags of `fit`; all classes have `init_args`, even if empty.

    Args:
        fit_flags: `--config` and any other flag.
        folder: Folder for the output of the process.
        timeout: Seconds after which the process is killed.

    Raises:
        UserError: If `fit` refuses them.
    """
    out, reason = fit([*fit_flags, "--print_config"], folder, timeout)
    if reason:
        raise UserError(reason)
    settings = yaml_text.load(out)
    for part in ("model", "data"):  # a data module of the user may have no options
        settings[part].setdefault("init_args", {})
    return settings


def shorten(settings: dict, steps: int, callbacks: list[dict]) -> None:
    """Changes the settings of a run to a few steps that are all logged, without checkpoints and warm-up."""
    trainer, model = settings["trainer"], settings["model"]["init_args"]
    own = trainer["callbacks"] or []
    trainer |= {
        "max_steps": steps,
        "max_epochs": -1,
        **dict.fromkeys(("min_steps", "min_epochs", "max_time")),
        "log_every_n_steps": 1,
        "check_val_every_n_epoch": None,
        "fast_dev_run": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "logger": {"class_path": "lm_lightning.callbacks.metrics_file.MetricsFile", "init_args": {"save_dir": "<run>"}},
        "callbacks": [*(own if isinstance(own, list) else [own]), *callbacks],
    }
    if "schedule" in model:
        model["schedule"]["warmup_steps"] = 0


def fit(
    arguments: list[str],
    folder: Path,
    timeout: float,
    nodes: int = 1,
    watch: Optional[Callable[[], str]] = None,
) -> tuple[str, str]:
    """Runs `fit` in a separate process, or one for each node, and kills all their child processes at the end.

    Args:
        arguments: Arguments of `fit`.
        folder: Folder for the output, in `out.txt` and `err.txt`.
        timeout: Seconds after which it is killed.
        nodes: Number of nodes to simulate on this machine.
        watch: Called twice a second; if it returns a reason, the run is ended.

    Returns:
        Its output, and the reason why it failed; empty if it did not.
    """
    environments: list[dict[str, str]] = [{}]
    if nodes > 1:
        main = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(2))}  # the next one is for the run folder
        environments = [main | {"NODE_RANK": str(rank)} for rank in range(nodes)]
    out, err = folder / "out.txt", folder / "err.txt"
    processes: list[subprocess.Popen] = []
    with open(out, "wb") as out_file, open(err, "wb") as err_file:
        deadline = time.monotonic() + timeout
        try:
            for environment in environments:
                process = subprocess.Popen(
                    [sys.executable, "-m", "lm_lightning", "fit", *arguments],
                    env=os.environ | environment | {"PYTHONIOENCODING": "utf-8:backslashreplace"},
                    stdin=subprocess.DEVNULL,
                    stdout=out_file,
                    stderr=err_file,
                    start_new_session=True,  # a group of processes
                    preexec_fn=kill_with_parent if sys.platform == "linux" else None,
                )
                processes.append(process)
            while watch is not None and any(process.poll() is None for process in processes):
                if reason := watch():
                    return "", reason
                if time.monotonic() > deadline:
                    break
                time.sleep(0.5)
            status = max((process.wait(max(0, deadline - time.monotonic())) for process in processes), key=abs)
        except subprocess.TimeoutExpired:
            return "", f"not finished after {timeout:g} seconds"
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    text = err.read_text(encoding="utf-8", errors="replace")
    if status == 0:
        return out.read_text(encoding="utf-8", errors="replace"), ""
    if status < 0:
        return "", f"killed by {signal.Signals(-status).name}" + (" (out of memory?)" if status == -9 else "")
    pattern = re.compile(r"^(?:\[rank\d+\]: ?)?(?:error: (.*)|([\w.]*(?:Error|Exception)\b.*))$")
    found = [match[1] or match[2] for line in text.splitlines() if (match := pattern.match(line))]
    return "", (found or text.strip().splitlines() or [""])[-1][:500] or f"exit status {status}"


def newest_run(runs_dir: Path, name: str) -> Optional[Path]:
    """The newest run with a name; None if there is none."""
    return max((runs_dir / name).glob("*/"), key=lambda path: path.stat().st_mtime_ns, default=None)


def logged(run: Optional[Path], metric: str) -> dict[int, float]:
    """The values of a metric by step that a run has logged so far.

    Args:
        run: Run folder; None if it does not exist yet.
        metric: Name of the metric, such as `val/loss`.
    """
    return {} if run is None else dict(read_metrics(run / "metrics.csv").get(metric, []))
