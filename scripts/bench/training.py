"""Measurements of training: `throughput` and `overhead`."""

import sys
import tempfile
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional

import harness
from workload import Prepared, Workload


def throughput(
    work: Workload = Workload(),
    peer: Optional[str] = None,
    peer_options: str = "--bf16",
    ours: dict[str, str] = {"ours": ""},  # noqa: B006
    steps: int = 30,
    warmup: int = 5,
    repeats: int = 3,
    breakdown: bool = True,
) -> None:
    """Tokens per second, share of the peak of matrix products, peak memory, and the time of each part of a step.

    The peak is that of the largest matrix product on a CPU, which each run measures when it begins, and that of the
    data sheet of a GPU. The peer's share follows from its tokens per second, as the network is the same.

    Args:
        work: What is trained.
        peer: Script of a peer.
        peer_options: More options of the peer.
        ours: Flags of `fit` by the name of the contestant, to compare several settings:
            `'{"ours": "", "compiled": "--model.compile true"}'`.
        steps: Optimizer steps of a run.
        warmup: Steps at its beginning that are not measured.
        repeats: Runs of each contestant.
        breakdown: Whether to measure the parts of a step, which makes steps slower on a GPU.
    """
    settings = asdict(work) | {"steps": steps, "warmup": warmup, "ours": ours, "peer_options": peer and peer_options}
    with tempfile.TemporaryDirectory() as folder:
        prepared = work.prepare(Path(folder))
        flags = ""
        # fork: profiling
        if breakdown and find_spec("lm_lightning.profiling"):
            flags = f"--trainer.profiler Profile --trainer.profiler.skip {warmup} --trainer.profiler.steps 0 "
        # fork: end
        contestants: dict[str, Any] = {
            name: lambda options=options: measure_fit(prepared, steps, warmup, flags + options)
            for name, options in ours.items()
        }
        if peer is not None:
            contestants["peer"] = lambda: measure_peer(prepared, peer, steps, warmup, peer_options)
        results = harness.take_turns(contestants, repeats)
        if peer is not None:
            for own, other in zip(results[next(iter(ours))], results["peer"]):
                if "share of matmul peak %" in own:
                    factor = other["throughput tokens/s"] / own["throughput tokens/s"]
                    other["share of matmul peak %"] = own["share of matmul peak %"] * factor
        reference = "peer" if peer is not None else next(iter(ours)) if len(ours) > 1 else None
        harness.report("throughput", settings, results, reference)


def measure_fit(prepared: Prepared, steps: int, warmup: int, options: str) -> harness.Measurement:
    """Figures of a run of this project."""
    found = prepared.fit(steps, warmup, options)
    figures = {"throughput tokens/s": found["tokens_per_s"], "peak memory MiB": found["peak_mib"]}
    if "share_of_peak" in found:
        figures["share of matmul peak %"] = 100 * found["share_of_peak"]
    return figures | {f"{part} ms": value for part, value in found["parts"].items()}


def measure_peer(prepared: Prepared, script: str, steps: int, warmup: int, options: str) -> harness.Measurement:
    """Figures of a run of a peer."""
    found = prepared.peer(script, steps, warmup, options)
    return {"throughput tokens/s": found["tokens_per_s"], "peak memory MiB": found["peak_mib"]}


def overhead(
    work: Workload = Workload(hidden=128, length=64, batch=12),
    options: str = "",
    steps: int = 105,
    warmup: int = 5,
    repeats: int = 3,
) -> None:
    """Time of a step of `fit` (module, callbacks and loader) and of the same step in a bare PyTorch loop.

    The bare loop has the same network, loss and optimizer, and batches that are already loaded. Both take turns of ten
    steps in the same process.

    Args:
        work: What is trained.
        options: More flags of `fit`.
        steps: Optimizer steps of `fit`.
        warmup: Steps at its beginning that are not measured.
        repeats: Runs.
    """
    with tempfile.TemporaryDirectory() as folder:
        prepared = work.prepare(Path(folder))
        results: dict[str, list[harness.Measurement]] = {"fit": [], "bare loop": []}
        for number in range(1, repeats + 1):
            print(f"[{number}/{repeats}] fit and bare loop", file=sys.stderr, flush=True)
            found = prepared.fit(steps, warmup, options, "Overhead")
            for fit, bare in zip(found["fit_ms"], found["bare_ms"]):
                results["fit"].append({"step ms": fit, "overhead %": 100 * (fit / bare - 1)})
                results["bare loop"].append({"step ms": bare})
        harness.report("overhead", asdict(work) | {"options": options}, results, "bare loop")
