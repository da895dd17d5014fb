"""A tokenizer from which unused tokens are removed divides its text as before, and represents all other text."""

import json

import pytest
from transformers import AutoTokenizer

from lm_lightning.data import shards
from lm_lightning.data.corpus import Corpus
from lm_lightning.data.tokenizer import Tokenizer, make, train
from lm_lightning.errors import UserError

TEXTS = ["The cat sat on the mat.\n", "A dog reads; the old house sleeps.\n", "Naïve cafés, 你好 and 1984!\n"]
OTHERS = ["the catalogue of dogs\n", "reading houses in 1884 & cafés"]


@pytest.fixture(scope="module", params=["bpe", "wordpiece", "unigram", "characters"])
def whole(request, tmp_path_factory):
    """A tokenizer that knows more than TEXTS."""
    folder = tmp_path_factory.mktemp(request.param)
    words = [f"{first}{second}ing houses catalogue sleeping 1884 &" for first in "abcdefgh" for second in "aeiou"]
    special = "bert" if request.param == "wordpiece" else "gpt"
    options = Tokenizer(algorithm=request.param, vocab_size=700)
    train(options, iter([" ".join(TEXTS)] * 20 + words), special).save_pretrained(folder)
    return folder


def reduced(folder, min_count, tmp_path):
    make(Tokenizer(path=str(folder), min_count=min_count), iter(TEXTS), "gpt").save_pretrained(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)


def test_the_text_has_the_same_tokens(whole, tmp_path):
    before, after = AutoTokenizer.from_pretrained(whole, split_special_tokens=True), reduced(whole, 1, tmp_path)
    for text in TEXTS:
        assert after.tokenize(text) == before.tokenize(text)
    used = {token for text in TEXTS for token in before.tokenize(text)}
    assert used <= after.get_vocab().keys()
    assert len(after) == len(before) if whole.name.startswith("characters") else len(after) < len(before)
    assert sorted(after.get_vocab().values()) == list(range(len(after)))
    assert after.special_tokens_map == before.special_tokens_map
    for text in OTHERS:  # special tokens around it are those of before
        assert after.decode(after(text)["input_ids"]) == before.decode(before(text)["input_ids"])


def test_rare_tokens_are_replaced_by_shorter_ones(whole, tmp_path):
    all_used, frequent = reduced(whole, 1, tmp_path), reduced(whole, 3, tmp_path)
    assert len(frequent) <= len(all_used)
    for text in TEXTS:
        assert frequent.decode(frequent(text)["input_ids"]) == all_used.decode(all_used(text)["input_ids"])


def test_it_is_the_same_each_time(whole, tmp_path):
    states = [json.loads(reduced(whole, 2, tmp_path).backend_tokenizer.to_str()) for _ in range(2)]
    assert states[0] == states[1]


def test_a_corpus_has_the_same_tokens(whole, tmp_path):
    (tmp_path / "text.txt").write_text("".join(TEXTS) * 50, encoding="utf-8")
    corpus = Corpus(paths=[str(tmp_path / "text.txt")], validation_fraction=0.0, test_fraction=0.0)
    found = []
    for count in (0, 1):
        options = Tokenizer(path=str(whole), min_count=count)
        prepared = shards.prepare(corpus, options, shards.Layout("gpt"), str(tmp_path / "cache"))
        tokens = prepared.split("train").tokens.astype(int).tolist()
        found.append(prepared.tokenizer.convert_ids_to_tokens(tokens))
    assert found[0] == found[1]


def test_other_models_are_refused(tmp_path):
    from lm_lightning.data.used_tokens import keep_used

    class Backend:
        def to_str(self):
            return json.dumps({"model": {"type": "Other"}, "added_tokens": []})

    class Other:
        backend_tokenizer = Backend()

    with pytest.raises(UserError, match="of type Other: omit it"):
        keep_used(Other(), TEXTS, 1)
