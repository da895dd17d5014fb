"""`scripts/bench`: each kind of measurement runs, with and without a peer, and its figures are plausible."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, needs
from forks import python

PEER = """
import argparse, json
parser = argparse.ArgumentParser()
parser.add_argument("task")
for name in ("config", "tokenizer", "train", "out", "length", "batch", "steps", "warmup", "seed"):
    parser.add_argument("--" + name, required=True)
given = parser.parse_args()
assert open(given.config).read() and open(given.train).read()
print(json.dumps({"tokens_per_s": 1000, "peak_mib": 100, "seconds": 1, "steps": int(given.steps)}))
"""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Iterator[Any]:
    """The modules of `scripts/bench`, a tiny workload and a peer that trains nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts/bench"))
        before = set(sys.modules)
        import harness
        import training
        import workload

        patch.setattr(harness, "PYTHON", python("lm_lightning"))

        class Bench:
            tiny = workload.Workload(text=str(corpus_file), layers=1, hidden=32, length=32, batch=2)
            peer = tmp_path_factory.mktemp("peer") / "peer.py"

        Bench.training = training  # type: ignore[attr-defined]
        Bench.peer.write_text(PEER)
        yield Bench
        for name in set(sys.modules) - before:
            if getattr(sys.modules[name], "__file__", None) and "scripts/bench" in str(sys.modules[name].__file__):
                del sys.modules[name]


def figures(capsys: pytest.CaptureFixture) -> dict:
    """The line of JSON of the latest measurement."""
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
@needs("profiling")
def test_throughput_is_compared_with_a_peer_in_turns(bench: Any, capsys: pytest.CaptureFixture):
    bench.training.throughput(bench.tiny, str(bench.peer), "", steps=4, warmup=1, repeats=2)
    found = figures(capsys)
    assert [run["throughput tokens/s"] for run in found["results"]["peer"]] == [1000, 1000]
    for run in found["results"]["ours"]:
        assert {"forward ms", "backward ms", "optimizer ms", "data ms"} < set(run)
        assert run["throughput tokens/s"] > 0 and run["peak memory MiB"] > 50
    ratio = found["ratios"]["ours"]["throughput tokens/s"]
    assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]


@pytest.mark.slow
def test_overhead_is_the_time_of_steps_beyond_those_of_the_bare_loop(bench: Any, capsys: pytest.CaptureFixture):
    bench.training.overhead(bench.tiny, steps=22, warmup=2, repeats=1)
    runs = figures(capsys)["results"]
    assert len(runs["fit"]) == len(runs["bare loop"]) == 2
    for fit, bare in zip(runs["fit"], runs["bare loop"]):
        assert fit["overhead %"] == pytest.approx(100 * (fit["step ms"] / bare["step ms"] - 1))
