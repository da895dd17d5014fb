"""Measurements of training: `throughput`, `overhead` and `time_to_loss`."""

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


def time_to_loss(
    work: Workload = Workload(),
    peer: Optional[str] = None,
    peer_options: str = "--bf16 --lr 1e-3",
    options: str = "",
    seconds: float = 120,
    shares: list[float] = [0.1, 0.2, 0.4, 1.0],  # noqa: B006
    goal: Optional[float] = None,
    repeats: int = 3,
) -> None:
    """Time of training until the held-out text has the loss that a peer reaches in a given time.

    The peer trains for that time, and this project for shares of it, each with a full schedule of the learning rate;
    the number of steps that are possible in a time is measured before. The time is interpolated between two shares.
    Times begin with the first step. Each turn has another seed.

    Args:
        work: What is trained.
        peer: Script of a peer.
        peer_options: More options of the peer, such as its best learning rate.
        options: More flags of `fit`.
        seconds: Time of the peer.
        shares: Shares of that time, ascending, for which this project is trained.
        goal: Loss to reach, in nats per token, instead of that of a peer.
        repeats: Runs of each contestant.
    """
    with tempfile.TemporaryDirectory() as name:
        prepared = work.prepare(Path(name))
        own_rate = prepared.fit(15, 5, options)["tokens_per_s"] / prepared.tokens_per_step
        results: dict[str, list[harness.Measurement]] = {"ours": []} | ({"peer": []} if peer else {})
        if peer is not None:
            rate = prepared.peer(peer, 15, 5, peer_options)["tokens_per_s"] / prepared.tokens_per_step
        for seed in range(repeats):
            reach = goal
            if peer is not None:
                found = prepared.peer(peer, max(2, round(seconds * rate)), 0, peer_options, seed)
                loss = held_out_loss(prepared, found["run"])
                timed = {"time to that loss s": found["seconds"]} if goal is None else {}  # it stopped at another loss
                results["peer"].append({"loss nats": loss} | timed)
                reach = loss if goal is None else goal
            points = []
            for share in shares:
                found = prepared.fit(max(2, round(share * seconds * own_rate)), 0, options, seed=seed)
                points.append((found["seconds"], held_out_loss(prepared, f"{found['run']}/model")))
                print(f"ours, seed {seed}: {points[-1][1]:.3f} nats in {points[-1][0]:.0f} s", file=sys.stderr)
            figures = {f"loss after {100 * share:g} % nats": loss for share, (_, loss) in zip(shares, points)}
            reached = None if reach is None else interpolated(points, reach)
            results["ours"].append(figures | ({} if reached is None else {"time to that loss s": reached}))
        settings = asdict(work) | {"seconds": seconds, "options": options, "peer_options": peer and peer_options}
        harness.report("time_to_loss", settings | {"goal": goal}, results, "peer" if peer else None)


def interpolated(points: list[tuple[float, float]], goal: float) -> Optional[float]:
    """The time at which a loss is reached, None if it is not; the loss is linear in the logarithm of the time.

    Args:
        points: Time and loss of several runs, by time. If the first has reached the goal, its time is the result.
        goal: The loss.
    """
    before: Optional[tuple[float, float]] = None
    for time, loss in points:
        if loss <= goal:
            if before is None:
                return time
            part = (before[1] - goal) / (before[1] - loss)
            return float(before[0] * (time / before[0]) ** part)
        before = time, loss
    return None


def held_out_loss(prepared: Prepared, folder: str, blocks: int = 200) -> float:
    """Mean loss of an exported network on the held-out text in nats per token, computed by transformers alone.

    Of a BERT, it is that of 15 % of the tokens, which are replaced by the mask token. If the network has a tokenizer of
    its own, the loss is still for each token of the workload's tokenizer, so that losses can be compared.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

    causal = prepared.work.task == "gpt"
    shared = AutoTokenizer.from_pretrained(prepared.folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = (AutoModelForCausalLM if causal else AutoModelForMaskedLM).from_pretrained(folder).eval()
    lines = (prepared.folder / "held_out.txt").read_text(encoding="utf-8").split("\n\n")
    own, of_shared = (
        [token for ids in kind(lines, verbose=False)["input_ids"] for token in ids] for kind in (tokenizer, shared)
    )
    tokens = torch.tensor(own)
    length = min(prepared.work.length, len(tokens))
    inputs = tokens[: len(tokens) // length * length].view(-1, length)[:blocks]
    targets = inputs.clone()
    if not causal:
        masked = torch.rand(inputs.shape, generator=torch.Generator().manual_seed(0)) < 0.15
        targets[~masked] = -100
        inputs = inputs.masked_fill(masked, tokenizer.mask_token_id)
    total = count = 0.0
    with torch.no_grad():
        for ids, target in zip(inputs.split(8), targets.split(8)):
            logits = network(input_ids=ids).logits.float()
            if causal:
                logits, target = logits[:, :-1], target[:, 1:]
            total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum").item()
            count += (target != -100).sum().item()
    return total / count * len(own) / len(of_shared)
