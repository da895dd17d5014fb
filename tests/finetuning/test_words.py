"""Words: which token stands for each word, with any tokenizer."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_lightning.data.tokenizer import Tokenizer, load, train
from lm_lightning.finetuning.words import TRUNCATED, encode_words

SENTENCES = [["Don", "'t", "see", "2 000", "naïve", "cafés", "…"], ["你好", "世界", "👩"], ["a"]]


@pytest.fixture(scope="module", params=["wordpiece", "bpe", "unigram"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp(request.param)
    texts = [" ".join(words) for words in SENTENCES] * 5
    made = train(Tokenizer(algorithm=request.param, vocab_size=350), iter(texts), "bert")
    made.save_pretrained(folder)
    return load(str(folder))


def text_of(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "").strip()


def test_tokens_from_one_word_to_the_next_are_the_word(tokenizer):
    for words, row in zip(SENTENCES, encode_words(tokenizer, SENTENCES, 200)):
        places = row["words"].tolist()
        assert sorted(places) == places and len(set(places)) == len(words)
        for word, start, end in zip(words, places, [*places[1:], len(row["input_ids"])]):
            assert text_of(tokenizer, row["input_ids"][start:end]) == word.replace(" ", "")


def test_words_that_are_cut_off_have_no_token(tokenizer):
    (row,) = encode_words(tokenizer, SENTENCES[:1], 5)
    places = row["words"].tolist()
    kept = [place for place in places if place != TRUNCATED]
    assert len(row["input_ids"]) <= 5 and len(places) == len(SENTENCES[0])
    assert 0 < len(kept) < len(places) and places == kept + [TRUNCATED] * (len(places) - len(kept))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(min_size=1).filter(lambda word: word.strip()), min_size=1, max_size=6))
def test_each_word_has_a_token_of_its_own_place(tokenizer, words: list[str]):
    (row,) = encode_words(tokenizer, [words], 2000)
    places = row["words"].tolist()
    assert len(places) == len(words)
    assert all(0 <= place < len(row["input_ids"]) for place in places)
    assert places == sorted(places)
