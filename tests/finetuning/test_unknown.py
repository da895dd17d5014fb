"""Tokens that the tokenizer does not know are counted, and much unknown text is warned of with an example."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Optional

import pytest
from conftest import needs, optional, paragraphs

from lm_lightning.data.corpus import Corpus
from lm_lightning.data.stream import StreamData
from lm_lightning.data.tokenizer import Tokenizer, load, train, unknown_id, unknown_word
from lm_lightning.finetuning.data import LabelledData
from lm_lightning.finetuning.tables import Tables

CHINESE = "我 喜欢 这部 电影"


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A WordPiece tokenizer that knows no Chinese."""
    folder = tmp_path_factory.mktemp("english")
    options = Tokenizer(algorithm="wordpiece", vocab_size=300, lowercase=True)
    train(options, iter(paragraphs(100)), "bert").save_pretrained(folder)
    return str(folder)


def setup(data: StreamData, capsys) -> list[str]:
    """What a data module prints when it is set up for training."""
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        lightning_module=SimpleNamespace(own_labels=lambda: []),
        state=SimpleNamespace(fn="fit"),
        is_global_zero=True,
        limit_val_batches=1,
    )
    capsys.readouterr()
    data.setup("fit")
    return capsys.readouterr().out.splitlines()


def labelled(kind: str, columns: Optional[dict] = None, **options: object) -> Callable[..., LabelledData]:
    def make(train: str, held: str, path: str) -> LabelledData:
        data = optional(kind)(tables=Tables(train, held), tokenizer=Tokenizer(path), **options)
        if columns:
            data.columns = replace(data.columns, **columns)
        return data

    return make


@pytest.mark.parametrize(
    "make",
    [
        labelled("tasks.classification.data.ClassificationData"),
        labelled("tasks.classification.data.ClassificationData", columns={"pair": "pair"}),
        labelled("tasks.tagging.data.TaggingData"),
        labelled("tasks.embedding.data.PairData"),
        labelled("tasks.questions.data.QuestionData", max_length=64, max_question=16, overlap=8),
    ],
    ids=["classification", "of pairs", "tagging", "pairs", "questions"],
)
def test_unknown_tokens_of_rows(tmp_path: Path, english: str, make: Callable, capsys):
    files = []
    for split, odd in (("train", 1), ("validation", 30)):
        rows = []
        for i, text in enumerate(paragraphs(60)):
            text = CHINESE if i % 60 < odd else " ".join(text.split()[:12])
            row = {
                "text": text,
                "pair": text,
                "label": "ab"[i % 2],
                "words": text,
                "labels": " ".join("X" * len(text.split())),
            }
            row["labels"] = row["labels"].replace("X", "Y", 1)
            rows.append(row | {"context": text, "question": text, "answers": []})
        file = tmp_path / f"{split}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append(str(file))
    data = make(*files, english)
    out = setup(data, capsys)
    for split in ("train", "validation"):
        tokens = [token for row in data.examples[split].rows for token in row["input_ids"]]
        unknown = data.tokenizer.convert_ids_to_tokens(tokens).count("[UNK]")
        assert unknown > 0
        line = next(line for line in out if line.startswith(f"{split}: ") and "tokens" in line)
        assert f"{len(tokens):,} tokens" in line
        assert line.endswith(f", {unknown:,} of the tokens are unknown ({unknown / len(tokens):.2%})")
        warnings = [line for line in out if line.startswith(f"warning: {split}: ")]
        if split == "train":
            assert unknown / len(tokens) < 0.03 and not warnings
        else:
            (warning,) = warnings
            assert f": {unknown / len(tokens):.0%} of the tokens are unknown to the tokenizer, such as '我'" in warning
            assert "--model.pretrained" in warning


@pytest.mark.parametrize("kind", ["data.pretraining.PretrainingData", "tasks.masked_lm.data.MaskedData"])
def test_unknown_tokens_of_a_corpus(tmp_path: Path, english: str, kind: str, capsys):
    (tmp_path / "train.txt").write_text("\n\n".join(paragraphs(100)))
    (tmp_path / "held.txt").write_text("\n\n".join([*paragraphs(20), *[CHINESE] * 40]), encoding="utf-8")
    corpus = Corpus(str(tmp_path / "train.txt"), str(tmp_path / "held.txt"), validation_fraction=0, test_fraction=0)
    for _ in range(2):  # tokenized, then from the cache
        data = optional(kind)(corpus, Tokenizer(english), block_size=16, cache_dir=str(tmp_path / "cache"))
        out = setup(data, capsys)
        tokens = data.splits["validation"].tokens
        unknown = data.tokenizer.convert_ids_to_tokens(tokens.tolist()).count("[UNK]")
        assert unknown > 40
        line = next(line for line in out if line.startswith("validation: "))
        assert line.endswith(f", {unknown:,} of the tokens are unknown ({unknown / len(tokens):.2%})")
        (warning,) = [line for line in out if line.startswith("warning: ")]
        assert warning.startswith(f"warning: the validation split: {unknown / len(tokens):.0%} of the tokens")
        assert "such as '我'" in warning and "--data.tokenizer.path" in warning
        assert "unknown" not in next(line for line in out if line.startswith("train: "))


@needs("tasks.masked_lm")
def test_unknown_words_of_texts_to_fill_in(english: str, capsys):
    from lm_lightning.tasks.masked_lm.data import Texts

    data = SimpleNamespace(tokenizer=load(english), block_size=64, trainer=SimpleNamespace(is_global_zero=True))
    Texts(["the [MASK] of it"], data)
    assert capsys.readouterr().out == ""
    Texts([f"{CHINESE} [MASK]"], data)
    assert capsys.readouterr().out.startswith(f"warning: the text '{CHINESE} [MASK]': ")


def test_what_is_unknown_to_other_tokenizers(tmp_path: Path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    for special in ("gpt", "bert"):
        for algorithm in ("bpe", "bytes", "unigram"):  # of bytes, which write everything
            made = train(Tokenizer(algorithm=algorithm, vocab_size=300), iter(paragraphs(20)), special)
            assert unknown_id(made) is None
        for algorithm in ("wordpiece", "characters"):
            made = train(Tokenizer(algorithm=algorithm, vocab_size=300), iter(paragraphs(20)), special)
            assert unknown_id(made) == made.unk_token_id is not None
            assert unknown_word(made, ["the", f"the {CHINESE}"]) == "我"
    backend = Backend(models.Unigram([("<pad>", 0.0), ("<unk>", -9.0), ("a", -1.0), ("b", -1.5)], unk_id=1))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")  # noqa: S106
    assert unknown_id(pieces) == 1 and unknown_word(pieces, ["a b", "a z"]) == "z"
    openai = PreTrainedTokenizerFast(  # GPT-2's names the end of a text as its unknown token
        tokenizer_object=train(Tokenizer(vocab_size=300), iter(paragraphs(20)), "gpt").backend_tokenizer,
        unk_token="<|endoftext|>",  # noqa: S106
        eos_token="<|endoftext|>",  # noqa: S106
    )
    assert unknown_id(openai) is None
