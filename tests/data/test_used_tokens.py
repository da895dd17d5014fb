"""A tokenizer from which unused tokens are removed divides its text as before, and represents all other text."""

import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE, Unigram
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lm_lightning.data import shards
from lm_lightning.data.corpus import Corpus
from lm_lightning.data.tokenizer import Tokenizer, load, make, train
from lm_lightning.data.used_tokens import keep_used
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


def test_special_tokens_that_are_text_are_counted_as_text(tmp_path):
    texts = ["<|endoftext|>" * 5, *TEXTS]
    train(Tokenizer(vocab_size=700), iter(texts * 20), "gpt").save_pretrained(tmp_path)
    before = load(str(tmp_path))
    after = keep_used(before, texts, 1)
    assert after.tokenize(texts[0]) == before.tokenize(texts[0]) != ["<|endoftext|>"] * 5


def test_the_end_of_a_word_is_no_part_of_a_character():
    vocabulary = {"<unk>": 0, "a": 1, "b": 2, "a</w>": 3, "b</w>": 4, "ab</w>": 5}
    backend = Backend(BPE(vocabulary, [("a", "b</w>")], unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert keep_used(tokenizer, ["ab"], 1).tokenize("a b ab") == ["a</w>", "b</w>", "ab</w>"]


def test_added_tokens_keep_their_order_and_their_ids_in_the_template():
    backend = Backend(Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0), ("ab", -1.5), ("ba", -9.0)], unk_id=0))
    backend.add_special_tokens(["<s>", "de", "en", "</s>"])
    special = [(token, backend.token_to_id(token)) for token in ("en", "</s>")]
    backend.post_processor = TemplateProcessing(single="en $A </s>", special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    after = keep_used(tokenizer, ["ab"], 1)
    assert after.convert_ids_to_tokens(after("ab")["input_ids"]) == ["en", "ab", "</s>"]
    assert after.convert_ids_to_tokens(range(len(after))) == ["<unk>", "a", "b", "ab", "<s>", "de", "en", "</s>"]


@pytest.mark.parametrize(("options", "message"), [({"min_count": -1}, "is -1"), ({"min_count": 1}, "path, or omit it")])
def test_a_minimum_without_effect_is_refused(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        shards.prepare(Corpus(), Tokenizer(**options), shards.Layout("gpt"), str(tmp_path))


def test_other_models_are_refused():
    class Other:
        def to_str(self):
            return json.dumps({"model": {"type": "Other"}, "added_tokens": []})

    class Holder:
        backend_tokenizer = Other()

    with pytest.raises(UserError, match="of type Other: omit it"):
        keep_used(Holder(), TEXTS, 1)
