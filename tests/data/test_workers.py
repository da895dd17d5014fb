"""Samples and collate functions reach worker processes of any start method, as each is pickled."""

import json
import pickle
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import optional, paragraphs

from lm_lightning.data.corpus import Corpus
from lm_lightning.data.stream import StreamData
from lm_lightning.data.tokenizer import Tokenizer, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables of all tasks, a corpus and a tokenizer."""
    folder = tmp_path_factory.mktemp("workers")
    rows = []
    for i, text in enumerate(paragraphs(40)):
        text = " ".join(text.split()[:12])
        words = text.split()
        row: dict = {"words": words, "form": words, "labels": ["O" if len(word) < 5 else "B-LONG" for word in words]}
        row |= {"head": list(range(len(words))), "deprel": ["root"] + ["next"] * (len(words) - 1)}
        row["frames"] = [{"predicate": 1, "spans": [[0, 0, "ARG0"], [1, 1, "V"]]}]
        answers = [{"text": row["words"][0], "answer_start": 0}]
        more = {
            "text": text,
            "pair": text,
            "label": "ab"[i % 2],
            "context": text,
            "question": "who",
            "answers": answers,
        }
        rows.append(json.dumps(row | more))
    (folder / "rows.jsonl").write_text("\n".join(rows))
    (folder / "corpus.txt").write_text("\n\n".join(paragraphs(300)))
    train(Tokenizer(algorithm="wordpiece", vocab_size=300), iter(paragraphs(100)), "bert").save_pretrained(
        folder / "tok"
    )
    return folder


def labelled(kind: str, **options: object) -> Callable[[Path], StreamData]:
    def make(folder: Path) -> StreamData:
        file, tables = str(folder / "rows.jsonl"), optional("finetuning.tables.Tables")
        return optional(kind)(
            tables=tables(file, file), tokenizer=Tokenizer(str(folder / "tok")), batch_size=4, **options
        )

    return make


def pretraining(kind: str, **options: object) -> Callable[[Path], StreamData]:
    def make(folder: Path) -> StreamData:
        corpus, tokenizer = Corpus(str(folder / "corpus.txt")), Tokenizer(str(folder / "tok"))
        return optional(kind)(
            corpus, tokenizer, block_size=32, batch_size=4, cache_dir=str(folder / "cache"), **options
        )

    return make


def equal(one: object, other: object) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize(
    "make",
    [
        labelled("tasks.classification.data.ClassificationData"),
        labelled("tasks.tagging.data.TaggingData"),
        labelled("tasks.tagging.roles.RoleData"),
        labelled("tasks.parsing.data.ParsingData"),
        labelled("tasks.embedding.data.PairData"),
        labelled("tasks.questions.data.QuestionData", max_length=96, overlap=4, max_question=8),
        pretraining("data.pretraining.PretrainingData", mask_documents=True),
        pretraining("tasks.masked_lm.data.MaskedData"),
        pretraining("tasks.masked_lm.data.MaskedData", next_sentence=True),
    ],
    ids=["classification", "tagging", "roles", "parsing", "pairs", "questions", "gpt", "bert", "bert with pairs"],
)
def test_samples_and_collate_functions_are_pickled(make: Callable[[Path], StreamData], folder: Path):
    data = make(folder)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        lightning_module=SimpleNamespace(own_labels=lambda: []),
        state=SimpleNamespace(fn="fit"),
        is_global_zero=False,
        limit_val_batches=1,
        accumulate_grad_batches=1,
        overfit_batches=0,
        strategy=None,
    )
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        samples, collate = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
        for batch in islice(loader.batch_sampler, 2):
            here, there = loader.collate_fn([loader.dataset[i] for i in batch]), collate([samples[i] for i in batch])
            assert equal(here, there)
    if type(data).__name__ == "MaskedData":
        texts = optional("tasks.masked_lm.data.Texts")(["a [MASK] b"], data)
        assert equal(pickle.loads(pickle.dumps(texts))[0], texts[0])
