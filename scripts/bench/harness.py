"""What all measurements share: they take turns, and their ratios are printed as a table and a line of JSON."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Optional

ROOT = Path(__file__).parent.parent.parent  # of the repository
PYTHON = sys.executable
Measurement = dict[str, float]


def take_turns(contestants: Mapping[str, Callable[[], Measurement]], repeats: int) -> dict[str, list[Measurement]]:
    """Runs each contestant once, then each of them again, ..., so that a change of the machine affects all of them."""
    results: dict[str, list[Measurement]] = {name: [] for name in contestants}
    for number in range(1, repeats + 1):
        for name, measure in contestants.items():
            print(f"[{number}/{repeats}] {name}", file=sys.stderr, flush=True)
            results[name].append(measure())
    return results


def report(
    kind: str, settings: Mapping[str, Any], results: Mapping[str, list[Measurement]], reference: Optional[str]
) -> None:
    """Prints the table and the line of JSON.

    A ratio is that of the values of the same turn, and its spread is the smallest and largest of them. It is the value
    divided by that of the reference; for times, the other way round: how many times faster.

    Args:
        kind: The measurement.
        settings: What was measured.
        results: Measurements of each contestant: a number by its name, which ends with its unit.
        reference: The contestant to which the others are compared; None for no comparison.
    """
    names = list(dict.fromkeys(metric for runs in results.values() for run in runs for metric in run))
    width, first = max(map(len, names)), max(map(len, results))
    print(f"{'':{width}}  {'':{first}}{'median':>12}{'min':>12}{'max':>12}   ratio to {reference or '-'}")
    ratios: dict[str, dict[str, dict[str, float]]] = {}
    for metric in names:
        for name, runs in results.items():
            values = [run[metric] for run in runs if metric in run]
            if not values:
                continue
            line = f"{metric:{width}}  {name:{first}}" + "".join(f"{number:12,.4g}" for number in spread(values))
            if reference is not None and name != reference:
                pairs = [
                    (a[metric], b[metric]) for a, b in zip(runs, results[reference]) if metric in a and metric in b
                ]
                quotients = [b / a if is_time(metric) else a / b for a, b in pairs if a and b]
                if quotients:
                    middle, least, most = spread(quotients)
                    ratios.setdefault(name, {})[metric] = {"median": middle, "min": least, "max": most}
                    line += f"   {middle:.2f} ({least:.2f} to {most:.2f})"
            print(line)
    fields = {"kind": kind, "machine": machine(), "settings": settings, "reference": reference}
    print(json.dumps({**fields, "results": results, "ratios": ratios}))


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, smallest and largest value."""
    return statistics.median(values), min(values), max(values)


def is_time(metric: str) -> bool:
    """Whether a number is a time, so that less is better: its name ends with its unit."""
    return metric.split()[-1] in ("s", "ms")


def machine() -> dict[str, Any]:
    """What the figures depend on. The load is the number of waiting or running processes of the last minute."""
    import torch
    import transformers

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def run(words: list[str]) -> str:
    """Runs a Python script or module, and returns what it prints; the package is that of this repository."""
    paths = [str(ROOT), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run([PYTHON, *words], env=os.environ | settings, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\nhas failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def seconds(call: Callable[[], Any]) -> float:
    """The time of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def last_json(output: str) -> dict[str, Any]:
    """The last line of an output that is a JSON object."""
    return json.loads([line for line in output.splitlines() if line.startswith("{")][-1])
