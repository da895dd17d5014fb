"""Masks and sentence pairs: what BERT's pretraining sees."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import paragraphs

from lm_lightning.data import shards
from lm_lightning.data.corpus import Corpus
from lm_lightning.data.order import PADDING
from lm_lightning.data.tokenizer import Tokenizer, text_ids, train
from lm_lightning.errors import UserError
from lm_lightning.tasks.masked_lm.data import MaskedBlocks, MaskedPairs
from lm_lightning.tasks.masked_lm.masking import Masker, Masking
from lm_lightning.tasks.masked_lm.model import MaskedLM
from lm_lightning.tasks.masked_lm.sentences import NEXT, RANDOM, SentencePairs

LENGTH = 64


@pytest.fixture(scope="module")
def wordpiece():
    return train(Tokenizer(algorithm="wordpiece", vocab_size=300), iter(paragraphs(200)), "bert")


@pytest.fixture(scope="module")
def bpe():
    return train(Tokenizer(vocab_size=400), iter(paragraphs(200)), "bert")


def block(tokenizer, text: str = " ".join(paragraphs(10))) -> np.ndarray:
    return np.array(tokenizer(text)["input_ids"][:LENGTH])


def masked(tokenizer, masking: Masking, ids: np.ndarray, seed: int = 0, words: np.ndarray = np.empty(0)) -> tuple:
    return Masker(masking, tokenizer, len(ids))(ids, np.random.default_rng(seed), words)


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_masks_hide_the_share_asked_for_and_never_special_tokens(wordpiece, unit: str):
    ids = block(wordpiece)
    counts, kinds = Counter(), Counter()
    for seed in range(2000):
        seen, positions, targets = masked(wordpiece, Masking(unit=unit), ids, seed)
        hidden = positions[targets != -100]
        assert 1 <= len(hidden) <= round(0.15 * LENGTH) and len(set(hidden)) == len(hidden)
        assert (targets[targets != -100] == ids[hidden]).all()
        assert (np.delete(seen, hidden) == np.delete(ids, hidden)).all()
        counts.update(hidden.tolist())
        for position in hidden:
            is_mask, same = seen[position] == wordpiece.mask_token_id, seen[position] == ids[position]
            kinds["mask" if is_mask else "same" if same else "random"] += 1
    assert 0 not in counts, "[CLS] is never hidden"
    total = sum(kinds.values())
    for kind, share in (("mask", 0.8), ("same", 0.1 + 0.1 / 300), ("random", 0.1)):  # random may hit the token itself
        assert abs(kinds[kind] - share * total) < 3 * np.sqrt(share * (1 - share) * total) + 0.001 * total
    if unit == "token":  # every position as often as the others
        expected = total / (LENGTH - 1)
        assert max(abs(counts[i] - expected) for i in range(1, LENGTH)) < 5 * np.sqrt(expected)
        assert total == 2000 * round(0.15 * (LENGTH - 1))


def test_random_tokens_are_ordinary_ones(wordpiece):
    ids = block(wordpiece)
    masking = Masking(rate=0.9, mask=0, random=1)
    seen = np.concatenate([masked(wordpiece, masking, ids, seed)[0][1:] for seed in range(100)])
    assert not set(seen.tolist()) & set(wordpiece.all_special_ids)
    assert len(set(seen.tolist())) > 200


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_whole_words_are_hidden_whole(kind: str, request):
    tokenizer = request.getfixturevalue(kind)
    text = " ".join(["remembered neighbours", "lantern captain"] * 8)
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
    word_of = tokenizer(text, add_special_tokens=False).word_ids()
    assert len(ids) > len(set(word_of)) + 5, "words have several tokens"
    for seed in range(50):
        _, positions, targets = masked(tokenizer, Masking(rate=0.3, unit="word"), ids, seed)
        hidden = set(positions[targets != -100].tolist())
        words = {word_of[i] for i in hidden}
        assert hidden == {i for i, word in enumerate(word_of) if word in words}


def test_chinese_words_are_characters_or_those_of_a_given_segmentation(tmp_path: Path):
    text = "我们 喜欢 音乐 他们 喜欢 读书 " * 6
    tokenizer = train(Tokenizer(algorithm="wordpiece", vocab_size=50), iter([text]), "bert")
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.txt").write_text(text)
    corpus = Corpus(*([str(tmp_path / f"{name}.txt")] for name in ("train", "validation", "test")))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    layout = shards.Layout("bert", words=True)
    options = Tokenizer(path=str(tmp_path / "tokenizer"))
    split = shards.prepare(corpus, options, layout, str(tmp_path / "cache")).split("train")
    ids, words = split.tokens.astype(np.int64), split.words
    assert words.tolist()[:7] == [1, 1, 0, 1, 0, 1, 0]  # [CLS] 我们 喜欢 音乐
    pairs = 0
    for seed in range(50):
        _, positions, targets = masked(tokenizer, Masking(unit="space"), ids, seed, words)
        hidden = sorted(positions[targets != -100].tolist())
        assert all(first + 1 == second and first % 2 == 1 for first, second in zip(hidden[::2], hidden[1::2]))
        pairs += len(hidden) // 2
        _, positions, targets = masked(tokenizer, Masking(unit="word"), ids, seed)
        assert (targets != -100).sum() == round(0.15 * 72)  # characters one by one
    assert pairs > 100


def test_spans_are_runs(wordpiece):
    ids = block(wordpiece)
    lengths = []
    for seed in range(300):
        _, positions, targets = masked(wordpiece, Masking(rate=0.3, unit="span"), ids, seed)
        hidden = positions[targets != -100]
        lengths += [len(run) for run in np.split(hidden, np.flatnonzero(np.diff(hidden) != 1) + 1)]
    assert 3 < np.mean(lengths) < 9


def test_a_block_of_one_long_word_still_has_a_target(wordpiece):
    ids = np.array(wordpiece("neighbours" * 8, add_special_tokens=False)["input_ids"])
    ids = np.concatenate([[wordpiece.cls_token_id], ids])
    _, _, targets = masked(wordpiece, Masking(unit="word"), ids)
    assert (targets != -100).sum() >= 1
    nothing = np.full(8, wordpiece.sep_token_id)
    assert (masked(wordpiece, Masking(), nothing)[2] == -100).all()


def test_masking_that_cannot_work_is_refused(wordpiece):
    characters = train(Tokenizer(algorithm="characters", vocab_size=100), iter(paragraphs(50)), "bert")
    with pytest.raises(UserError, match="does not mark words"):
        Masker(Masking(unit="word"), characters, 8)
    gpt = train(Tokenizer(algorithm="bytes"), iter(["a"]), "gpt")
    with pytest.raises(UserError, match="no mask token"):
        Masker(Masking(), gpt, 8)
    with pytest.raises(UserError, match="must be fractions"):
        Masker(Masking(rate=15), wordpiece, 8)
    for spans in ({"mean_span": 0.5}, {"max_span": 0}):
        with pytest.raises(UserError, match="but both must be 1 or more"):
            Masker(Masking(unit="span", **spans), wordpiece, 8)
    with pytest.raises(UserError, match="model.top_k is 0, but must be 1 or more"):
        MaskedLM(network={}, top_k=0)


@pytest.fixture(scope="module")
def split(tmp_path_factory, wordpiece) -> shards.Split:
    """Documents of five different sentences each, kept with their bounds."""
    folder = tmp_path_factory.mktemp("sentences")
    texts = [". ".join(f"{word} {d} {i} goes on" for i, word in enumerate("abcde")) + "." for d in range(40)]
    (folder / "train.txt").write_text("\n\n".join(texts))
    for name in ("validation", "test"):
        (folder / f"{name}.txt").write_text("One here. Two here.\n\nThree there. Four there.")
    wordpiece.save_pretrained(folder / "tokenizer")
    corpus = Corpus(*([str(folder / f"{name}.txt")] for name in ("train", "validation", "test")))
    options = Tokenizer(path=str(folder / "tokenizer"))
    return shards.prepare(corpus, options, shards.Layout("bert", "en"), str(folder / "cache")).split("train")


def test_sentences_of_documents_are_found(split, wordpiece):
    assert len(split.documents) == 40 and len(split.sentences) == 200
    assert set(split.documents.tolist()) <= set(split.sentences.tolist())
    assert not set(split.tokens.tolist()) & set(wordpiece.all_special_ids)


def test_half_of_the_pairs_follow_and_the_others_are_of_another_document(split):
    pairs = SentencePairs(split, 40, "train")
    labels = Counter()
    row = split.tokens.astype(int).tolist()
    bounds = [*split.documents.tolist(), len(row)]

    def documents_of(segment: list[int]) -> list[int]:
        """Documents that hold a segment."""
        size = len(segment)
        return [
            d
            for d, (start, stop) in enumerate(zip(bounds, bounds[1:]))
            if any(row[i : i + size] == segment for i in range(start, stop - size + 1))
        ]

    for sample in range(len(pairs)):
        for seed in range(3):
            a, b, label = pairs.pair(sample, np.random.default_rng(seed))
            assert len(a) and len(b) and len(a) + len(b) <= 40
            labels[label] += 1
            home, other = documents_of(a.tolist()), documents_of(b.tolist())
            joined = documents_of(a.tolist() + b.tolist())
            assert bool(joined) == (label == NEXT)
            if label == RANDOM and len(home) == 1 and len(other) == 1:
                assert home != other
    total = labels.total()
    assert abs(labels[NEXT] - total / 2) < 3 * np.sqrt(total) / 2


def test_pairs_look_as_bert_has_them(split, wordpiece):
    masker = Masker(Masking(), wordpiece, 48)
    data = MaskedPairs(SentencePairs(split, 45, "train"), text_ids(wordpiece), 0, 48, masker, seed=1)
    item = data[3]
    ids, segments, length = item["input_ids"].clone(), item["token_type_ids"], int(item["attention_mask"].sum())
    ids[item["positions"][item["targets"] != -100]] = item["targets"][item["targets"] != -100]
    separators = (ids == wordpiece.sep_token_id).nonzero().flatten().tolist()
    assert ids[0] == wordpiece.cls_token_id and len(separators) == 2 and separators[1] == length - 1
    assert segments.tolist() == [0] * (separators[0] + 1) + [1] * (length - separators[0] - 1) + [0] * (48 - length)
    assert (ids[length:] == wordpiece.pad_token_id).all()
    padding = data[PADDING]
    assert (padding["targets"] == -100).all() and padding["next_sentence"] == -100


def test_corpora_without_pairs_are_refused(split):
    with pytest.raises(UserError, match="two documents or more"):
        SentencePairs(split._replace(documents=split.documents[:1]), 40, "train")
    with pytest.raises(UserError, match="two sentences or more"):
        SentencePairs(split._replace(sentences=np.array(split.documents)), 40, "train")


def test_masks_are_new_in_each_epoch_and_the_same_in_each_run(wordpiece):
    tokens = np.tile(block(wordpiece), 5).astype(np.uint16)
    split = shards.Split(tokens, np.array([0]), 1, 1.0)
    data = MaskedBlocks(split, LENGTH, Masker(Masking(), wordpiece, LENGTH), seed=3)
    again = MaskedBlocks(split, LENGTH, Masker(Masking(), wordpiece, LENGTH), seed=3)
    assert all((data[i]["input_ids"] == again[i]["input_ids"]).all() for i in range(10))
    by_sample = [{data[e * 5 + i]["id"]: data[e * 5 + i]["positions"].tolist() for i in range(5)} for e in range(2)]
    assert by_sample[0].keys() == by_sample[1].keys()
    assert all(by_sample[0][sample] != by_sample[1][sample] for sample in by_sample[0])


def test_evaluation_reaches_the_last_token_and_counts_none_twice(wordpiece):
    tokens = np.tile(block(wordpiece), 3)[: 2 * LENGTH + 9].astype(np.uint16)
    split = shards.Split(tokens, np.array([0]), 1, 1.0)
    data = MaskedBlocks(split, LENGTH, Masker(Masking(rate=0.9), wordpiece, LENGTH), seed=None)
    assert len(data) == 3
    last = data[2]
    places = last["positions"][last["targets"] != -100]
    assert (places >= LENGTH - 9).all() and LENGTH - 1 in places.tolist()
