"""Thousands of damaged or forged files: each is read, or refused in one sentence.

Reading runs no code, starts no process, writes nothing outside of its folder and does not hang. The mutations are
seeded; a failure names its number, and `mutate(..., number)` in hostile.py makes the same file again.
"""

import contextlib
import importlib
import io
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import needs
from hostile import Guard, attack, mutated_json, mutations

from lm_lightning.checkpoints.loading import load_checkpoint
from lm_lightning.commands import export
from lm_lightning.data import shards, tokenizer
from lm_lightning.data.corpus import Corpus
from lm_lightning.data.tokenizer import Tokenizer
from lm_lightning.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint of a tiny network, and its tokenizer."""
    import transformers

    folder = tmp_path_factory.mktemp("runs") / "tiny" / "2026-01-01_00-00-00"
    (folder / "checkpoints").mkdir(parents=True)
    config = transformers.GPT2Config(vocab_size=300, n_layer=1, n_embd=8, n_head=1, n_positions=16)
    network = transformers.GPT2LMHeadModel(config)
    own = tokenizer.train(Tokenizer(algorithm="bytes", vocab_size=300), iter(()), "gpt")
    own.save_pretrained(folder / "tokenizer")
    description = {"class": "GPT2LMHeadModel", "config": config.to_dict(), "rows": 300}
    checkpoint = {
        "network": description | {"generation": network.generation_config.to_dict()},
        "state_dict": {f"network.{name}": value for name, value in network.state_dict().items()},
        "global_step": 3,
        "callbacks": {},
    }
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    return folder


@mutations(2000)
def test_damaged_checkpoints(run: Path, guard: Guard, tmp_path: Path, seeds: range):
    original = tmp_path / "run"
    shutil.copytree(run / "checkpoints", original)
    attack(original, lambda folder: load_checkpoint(folder / "last.ckpt"), seeds, guard, tmp_path)


@mutations(1000)
def test_forged_checkpoints_are_exported_or_refused(run: Path, guard: Guard, tmp_path: Path, seeds: range):
    importlib.import_module("lm_lightning.models.export")  # (matplotlib makes folders of its own when it is imported)
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    refused = 0
    for number in seeds:
        draw = random.Random(number)
        forged = saved | {"network": mutated_json(saved["network"], draw), "state_dict": dict(saved["state_dict"])}
        if draw.random() < 0.3:
            name = draw.choice(list(forged["state_dict"]))
            forged["state_dict"][name] = draw.choice(
                [torch.zeros(0), torch.zeros(3, 3), torch.zeros(300, 8) / 0, 5, None]
            )
        (tmp_path / "model").mkdir()
        try:
            with guard.watch(tmp_path, 10):
                export.write(forged, run / "tokenizer", tmp_path / "model")
        except UserError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"mutation {number}: {type(error).__name__}: {error}") from error
        assert not guard.harm, (number, guard.harm)
        shutil.rmtree(tmp_path / "model")
    assert refused > 0.3 * len(seeds)


@mutations(600)
def test_damaged_tokenizers(run: Path, guard: Guard, tmp_path: Path, seeds: range):
    attack(run / "tokenizer", lambda folder: tokenizer.load(str(folder)), seeds, guard, tmp_path)


@mutations(1500)
def test_damaged_shards(guard: Guard, tmp_path: Path, seeds: range):
    (tmp_path / "text.txt").write_text("\n\n".join(f"Paragraph {i} of a text." for i in range(60)))
    corpus, options = Corpus(paths=[str(tmp_path / "text.txt")]), Tokenizer(algorithm="bytes", vocab_size=300)
    original = shards.prepare(corpus, options, shards.Layout(), str(tmp_path / "cache")).folder

    def read(folder: Path) -> None:
        shards.check(folder)
        for name in shards.SPLITS:
            shards.open_split(folder, name)

    attack(original, read, seeds, guard, tmp_path)


@needs("tasks.embedding")
@mutations(1000)
def test_damaged_indexes(guard: Guard, tmp_path: Path, seeds: range):
    from lm_lightning.tasks.embedding import search

    original = tmp_path / "index"
    (original / "model").mkdir(parents=True)
    np.save(original / "embeddings.npy", np.eye(5, 4, dtype=np.float32))
    rows = [{"id": number, "text": f"text {number}"} for number in range(5)]
    (original / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (original / "index.json").write_text(json.dumps({"model": "model", "pooling": "mean", "max_length": 16}))

    def read(folder: Path) -> None:
        about = search.read_about(search.index_folder(str(folder)))
        assert Path(search.model_of(folder, about, None)) == folder.resolve() / "model"
        embeddings = search.read_embeddings(folder)
        found = search.read_rows(folder, {0, 3}, len(embeddings))
        assert all(isinstance(row["text"], str) for row in found.values())

    attack(original, read, seeds, guard, tmp_path)


@pytest.fixture(scope="module")
def model(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as a run has it."""
    folder = tmp_path_factory.mktemp("models") / "model"
    folder.mkdir()
    export.write(load_checkpoint(run / "checkpoints" / "last.ckpt"), run / "tokenizer", folder)
    return folder


@needs("generation")
@mutations(200)
def test_damaged_models_that_generate(model: Path, guard: Guard, tmp_path: Path, seeds: range):
    from lm_lightning.generation import generate
    from lm_lightning.generation.generation import prompt_ids
    from lm_lightning.generation.sampling import Sampling

    def read(folder: Path) -> None:
        network, own = generate.load(str(folder), "cpu")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ids = prompt_ids(own, "a b")
            generate.stream(network, own, ids, 2, Sampling(greedy=True))

    attack(model, read, seeds, guard, tmp_path)


@needs("tasks.embedding")
@mutations(100)
def test_damaged_models_of_an_index(model: Path, guard: Guard, tmp_path: Path, seeds: range):
    from lm_lightning.tasks.embedding import search

    attack(model, lambda folder: search.embedded("a", str(folder), search.About("", "mean", 8)), seeds, guard, tmp_path)
