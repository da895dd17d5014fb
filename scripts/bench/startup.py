"""Measurement of the time that commands need to begin: `startup`."""

import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Optional

import harness
from workload import Workload

HELPS = ("--help", "fit --help", "generate --help")


def startup(
    work: Workload = Workload(),
    peer: Optional[str] = None,
    peer_options: str = "--bf16",
    options: str = "",
    repeats: int = 3,
) -> None:
    """Time of `--help`, and of `fit` until its first step ends, with an empty and with a filled cache.

    The cache has the text, the tokenizer, the tokens and what `torch.compile` has compiled. `one step` is a command
    that trains one step on a text with a given tokenizer, which the peer does as well.

    Args:
        work: What the one step trains on.
        peer: Script of a peer.
        peer_options: More options of the peer.
        options: More flags of `fit`.
        repeats: Runs of each contestant.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepared = work.prepare(folder)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "recipe" / "compiled")

        def ours() -> harness.Measurement:
            figures = {}
            for words in HELPS:
                figures[f"{words} s"] = harness.seconds(
                    lambda words=words: harness.run(["-m", "lm_lightning", *words.split()])
                )
            shutil.rmtree(folder / "recipe", ignore_errors=True)
            (folder / "recipe").mkdir()
            for cache in ("empty", "filled"):
                figures[f"first step, {cache} cache s"] = first_step(work.task, folder / "recipe", options)
            figures["one step s"] = harness.seconds(lambda: prepared.fit(1, 0, options))
            return figures

        def theirs() -> harness.Measurement:
            return {"one step s": harness.seconds(lambda: prepared.peer(str(peer), 1, 0, peer_options))}

        results = harness.take_turns({"ours": ours} | ({"peer": theirs} if peer else {}), repeats)
        harness.report("startup", {"task": work.task, "options": options}, results, "peer" if peer else None)


def first_step(task: str, folder: Path, options: str) -> float:
    """Seconds from the start of `fit` with a recipe to the end of its first step."""
    words = ["-m", "lm_lightning", "fit", "--config", str(harness.ROOT / "configs" / f"{task}.yaml")]
    words += ["--data.cache_dir", str(folder / "cache"), "--runs_dir", str(folder / "runs"), *options.split()]
    words += ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"]
    words += ["--trainer.callbacks+=probe.Probe", "--trainer.callbacks.path", str(folder / "probe.json")]
    start = time.time()
    harness.run([*words, "--trainer.callbacks.warmup", "0"])
    return json.loads((folder / "probe.json").read_text(encoding="utf-8"))["first_step"] - start
