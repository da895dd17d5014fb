"""Measurement of tokenization and loading: `data`. As a script, it measures one contestant."""

import itertools
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import harness
from workload import Workload

STEP = 0.2  # seconds between two measurements of memory


def data(
    work: Workload = Workload(), megabytes: float = 20, processes: int = 2, samples: int = 2000, repeats: int = 3
) -> None:
    """Tokenization and packing into blocks, loading of batches, and memory; compared with `datasets`.

    `datasets` tokenizes with `map` and groups the tokens with a second `map`, as the examples of transformers do. The
    memory is the largest sum over all processes, in which shared pages count once (needs psutil).

    Args:
        work: The text, the tokenizer, and the size of blocks and batches.
        megabytes: Size of the text, which is repeated.
        processes: Processes of `datasets`, and threads of this project.
        samples: Blocks to load.
        repeats: Runs of each contestant.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work.prepare(folder)
        text = (folder / "train.txt").read_text(encoding="utf-8")
        with open(folder / "text.txt", "w", encoding="utf-8") as file:
            size = 0
            for number in itertools.count():
                if size >= megabytes * 1e6:
                    break
                part = text.replace("\n\n", f" {number}\n\n")[: int(megabytes * 1e6) - size + 1]
                size += file.write(part + "\n\n")
        os.environ["RAYON_NUM_THREADS"] = str(processes)

        def measure(contestant: str, turns: Any = itertools.count()) -> harness.Measurement:  # noqa: B008
            words = [__file__, contestant, str(folder), str(next(turns)), str(work.length), str(work.batch)]
            return harness.last_json(harness.run([*words, str(processes), str(samples)]))

        contestants = {"ours": lambda: measure("ours")}
        if find_spec("datasets"):
            contestants["datasets"] = lambda: measure("datasets")
        results = harness.take_turns(contestants, repeats)
        settings = asdict(work) | {"megabytes": megabytes, "processes": processes}
        harness.report("data", settings, results, "datasets" if "datasets" in results else None)


def ours(folder: Path, turn: str, length: int, batch: int, processes: int) -> Any:
    """Tokenizes and packs with this project, and returns its loader."""
    from torch.utils.data import DataLoader

    from lm_lightning.data import pretraining, shards
    from lm_lightning.data.corpus import Corpus
    from lm_lightning.data.order import StreamSampler
    from lm_lightning.data.tokenizer import Tokenizer

    corpus = Corpus(paths=[str(folder / "text.txt")], validation_fraction=0.0, test_fraction=0.0)
    tokenizer = Tokenizer(path=str(folder / "tokenizer"))
    prepared = shards.prepare(corpus, tokenizer, shards.Layout("gpt"), str(folder / turn))
    blocks = pretraining.Blocks(prepared.split("train"), length, False, 0)
    sampler = StreamSampler(len(blocks), batch, 1, 0, 1, lambda: 0)
    return DataLoader(blocks, batch_sampler=sampler, collate_fn=pretraining.collate)


def datasets(folder: Path, turn: str, length: int, batch: int, processes: int) -> Any:
    """Tokenizes and packs with `datasets`, and returns a loader."""
    from datasets import disable_progress_bars, load_dataset
    from torch.utils.data import DataLoader
    from transformers import AutoTokenizer, default_data_collator

    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    rows = load_dataset("text", data_files=str(folder / "text.txt"), cache_dir=str(folder / turn), split="train")

    def encode(part: dict) -> dict:
        return {"input_ids": tokenizer(part["text"], add_special_tokens=False)["input_ids"]}

    def group(part: dict) -> dict:
        tokens = list(itertools.chain.from_iterable(part["input_ids"]))
        cut = range(0, len(tokens) // length * length, length)
        return {"input_ids": [tokens[i : i + length] for i in cut], "labels": [tokens[i : i + length] for i in cut]}

    rows = rows.map(encode, batched=True, num_proc=processes, remove_columns=["text"])
    rows = rows.map(group, batched=True, num_proc=processes, remove_columns=["input_ids"])
    return DataLoader(rows, batch_size=batch, shuffle=True, collate_fn=default_data_collator)


@contextmanager
def memory(peak: list[float]) -> Iterator[None]:
    """Measures the memory of this process and its children until the context ends, and appends MiB to `peak`."""
    if not find_spec("psutil"):
        yield
        return
    import psutil

    ended = threading.Event()

    def watch() -> None:
        own = psutil.Process()
        while not ended.wait(STEP):
            total = 0
            for process in [own, *own.children(recursive=True)]:
                try:
                    info = process.memory_full_info()
                    total += getattr(info, "pss", info.uss)
                except psutil.Error:  # it has ended
                    continue
            peak.append(total / 2**20)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def main(contestant: str, folder: str, turn: str, length: str, batch: str, processes: str, samples: str) -> None:
    """Measures one contestant."""
    import torch  # noqa: F401 (imported before the clock starts)
    import transformers  # noqa: F401

    peak: list[float] = []
    prepare = {"ours": ours, "datasets": datasets}[contestant]
    with memory(peak):
        start = time.perf_counter()
        loader = prepare(Path(folder), turn, int(length), int(batch), int(processes))
        tokenized = time.perf_counter()
        loaded = 0
        while loaded < int(samples):
            for found in loader:
                loaded += len(found["input_ids"])
                if loaded >= int(samples):
                    break
        end = time.perf_counter()
    size = (Path(folder) / "text.txt").stat().st_size
    figures = {"tokenized and packed MB/s": size / 1e6 / (tokenized - start)}
    figures["loaded samples/s"] = loaded / (end - tokenized)
    print(json.dumps(figures | ({"peak memory MiB": max(peak)} if peak else {})))


if __name__ == "__main__":
    main(*sys.argv[1:])
