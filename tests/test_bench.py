"""`scripts/bench`: each kind of measurement runs, and compares with a peer in turns."""

import contextlib
import io
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
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
assert given.task == "clm" and open(given.train).read() and json.load(open(given.config))["n_embd"] == 32
print(json.dumps({"tokens_per_s": 1000, "peak_mib": 100, "seconds": 8, "steps": int(given.steps)}))
"""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Iterator[Any]:
    """The modules of `scripts/bench`, a tiny workload, and a peer that trains nothing."""
    folder = ROOT / "scripts" / "bench"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        import data
        import generation  # fork: gpt
        import harness
        import startup
        import training
        import workload

        patch.setattr(harness, "PYTHON", python("lm_lightning"))
        patch.setattr(startup, "HELPS", ("--help",))
        peer = tmp_path_factory.mktemp("peer") / "peer.py"
        peer.write_text(PEER)
        tiny = workload.Workload(text=str(corpus_file), layers=1, hidden=32, length=32, batch=2)
        made = SimpleNamespace(data=data, startup=startup, training=training, tiny=tiny, peer=str(peer))
        made.generation = generation  # fork: gpt
        yield made
        for name, module in list(sys.modules.items()):
            if Path(getattr(module, "__file__", None) or "/").parent == folder:
                del sys.modules[name]


@pytest.fixture
def measured(capsys: pytest.CaptureFixture) -> Callable[[], dict]:
    """The line of JSON of the latest measurement."""
    return lambda: json.loads(capsys.readouterr().out.splitlines()[-1])


@needs("profiling")
def test_throughput_and_its_parts(bench: Any, measured: Callable[[], dict]):
    bench.training.throughput(bench.tiny, bench.peer, "", steps=4, warmup=1, repeats=2)
    found = measured()
    assert [run["throughput tokens/s"] for run in found["results"]["peer"]] == [1000, 1000]
    for run in found["results"]["ours"]:
        assert {"forward ms", "backward ms", "optimizer ms", "data ms"} < set(run)
        assert run["throughput tokens/s"] > 0 and run["peak memory MiB"] > 50
    ratio = found["ratios"]["ours"]["throughput tokens/s"]
    assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    assert ratio["max"] * 1000 == pytest.approx(max(run["throughput tokens/s"] for run in found["results"]["ours"]))


def test_overhead_over_a_bare_loop(bench: Any, measured: Callable[[], dict]):
    bench.training.overhead(bench.tiny, steps=22, warmup=2, repeats=1)
    runs = measured()["results"]
    assert len(runs["fit"]) == len(runs["bare loop"]) == 2
    for fit, bare in zip(runs["fit"], runs["bare loop"]):
        assert fit["overhead %"] == pytest.approx(100 * (fit["step ms"] / bare["step ms"] - 1))


def test_time_to_the_loss_of_a_peer(bench: Any, measured: Callable[[], dict], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench.training, "held_out_loss", lambda prepared, folder: 3.0 if "peer" in folder else 2.0)
    bench.training.time_to_loss(bench.tiny, bench.peer, "", seconds=0.1, shares=[1.0], repeats=1)
    found = measured()["results"]
    assert found["peer"] == [{"loss nats": 3.0, "time to that loss s": 8}]
    assert found["ours"][0]["loss after 100 % nats"] == 2.0 and 0 < found["ours"][0]["time to that loss s"] < 600
    assert bench.training.interpolated([(1, 5.0), (4, 3.0)], 4.0) == pytest.approx(2)
    assert bench.training.interpolated([(1, 5.0), (4, 3.0)], 2.9) is None


def test_held_out_loss_is_that_of_a_uniform_guess_without_training(bench: Any, tmp_path: Path):
    from transformers import AutoConfig, AutoModelForCausalLM

    prepared = bench.tiny.prepare(tmp_path)
    config = AutoConfig.for_model(**json.loads((tmp_path / "network.json").read_text()))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "network")
    shutil.copytree(tmp_path / "tokenizer", tmp_path / "network", dirs_exist_ok=True)
    loss = bench.training.held_out_loss(prepared, str(tmp_path / "network"))
    assert math.exp(loss) == pytest.approx(config.vocab_size, rel=0.05)


def test_startup(bench: Any, measured: Callable[[], dict]):
    bench.startup.startup(bench.tiny, options="--data.corpus.paths " + bench.tiny.text, repeats=1)
    (run,) = measured()["results"]["ours"]
    assert run["--help s"] > 0 and 0 < run["first step, filled cache s"] < 600


def test_data(bench: Any, measured: Callable[[], dict], monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("datasets")

    def run_here(words: list[str]) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            bench.data.main(*words[1:])
        return out.getvalue()

    monkeypatch.setattr(bench.data.harness, "run", run_here)
    bench.data.data(bench.tiny, megabytes=0.1, processes=1, samples=10, repeats=1)
    found = measured()
    assert found["reference"] == "datasets"
    assert all(run["tokenized and packed MB/s"] > 0 for runs in found["results"].values() for run in runs)


@needs("generation")
def test_generation(bench: Any, measured: Callable[[], dict]):
    sizes = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 50}
    bench.generation.generate(network=sizes, batch_sizes=[2], prompt=6, new=20, repeats=1)
    found = measured()
    assert found["settings"]["texts with the same tokens"] == {"batch 2": "2 of 2"}
    assert found["results"]["ours"][0]["decode, batch 2 tokens/s"] > 0
