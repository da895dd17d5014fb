"""Samples and collate functions reach worker processes of any start method, as each is pickled."""

import json
import pickle
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from clauses import sentences
from conftest import paragraphs

from lm_lightning.data.corpus import Corpus
from lm_lightning.data.pretraining import PretrainingData
from lm_lightning.data.stream import StreamData
from lm_lightning.data.tokenizer import Tokenizer, train
from lm_lightning.finetuning.tables import Tables
from lm_lightning.tasks.classification.data import ClassificationData
from lm_lightning.tasks.embedding.data import PairData
from lm_lightning.tasks.masked_lm.data import MaskedData, Texts
from lm_lightning.tasks.parsing.data import ParsingData
from lm_lightning.tasks.questions.data import QuestionData
from lm_lightning.tasks.tagging.data import TaggingData
from lm_lightning.tasks.tagging.roles import RoleData


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables of all tasks, a corpus and a tokenizer."""
    folder = tmp_path_factory.mktemp("workers")
    rows = []
    for i, row in enumerate(sentences(40, 0)):
        text = " ".join(row["words"])
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
    texts = [" ".join(row["words"]) for row in sentences(40, 0)] + paragraphs(100)
    train(Tokenizer(algorithm="wordpiece", vocab_size=300), iter(texts), "bert").save_pretrained(folder / "tok")
    return folder


def labelled(kind: type, **options: object) -> Callable[[Path], StreamData]:
    def make(folder: Path) -> StreamData:
        file = str(folder / "rows.jsonl")
        return kind(tables=Tables(file, file), tokenizer=Tokenizer(str(folder / "tok")), batch_size=4, **options)

    return make


def pretraining(kind: type, **options: object) -> Callable[[Path], StreamData]:
    def make(folder: Path) -> StreamData:
        corpus, tokenizer = Corpus(str(folder / "corpus.txt")), Tokenizer(str(folder / "tok"))
        return kind(corpus, tokenizer, block_size=32, batch_size=4, cache_dir=str(folder / "cache"), **options)

    return make


def equal(one: object, other: object) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize(
    "make",
    [
        labelled(ClassificationData),
        labelled(TaggingData),
        labelled(RoleData),
        labelled(ParsingData),
        labelled(PairData),
        labelled(QuestionData, max_length=96, overlap=4, max_question=8),
        pretraining(PretrainingData, mask_documents=True),
        pretraining(MaskedData),
        pretraining(MaskedData, next_sentence=True),
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
    if isinstance(data, MaskedData):
        texts = Texts(["a [MASK] b"], data)
        assert equal(pickle.loads(pickle.dumps(texts))[0], texts[0])
