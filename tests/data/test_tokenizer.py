"""Tokenizers: trained ones are reproducible and exact, loaded ones fail in one sentence."""

import json
import logging
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lm_lightning import hub
from lm_lightning.data.tokenizer import Tokenizer, document_ids, fingerprint, load, train
from lm_lightning.errors import UserError

ALGORITHMS = ["bpe", "wordpiece", "unigram", "characters", "bytes"]
EXACT = ["bpe", "unigram", "bytes"]
EXAMPLES = [
    "The cat sat on the mat.",
    " two  spaces,\ta tab and\r\nWindows' lines\n\n",
    "naïve café, 你好，世界 and 🙂👩‍🔬",
    "a<|endoftext|>b [SEP][PAD] [MASK]<|unk|>",
]

WORDS = (
    "the a cat dog house tree language model reads writes walks sees every small large old new word of and "
    "with under over quickly slowly Monday London 1984 don't it's never-ending"
)


def texts(count=300):
    """Made-up English, in which words of the same frequency, and so ties in training, are common."""
    choice, words = random.Random(0).choice, WORDS.split()
    return [" ".join(choice(words) for _ in range(40)).capitalize() + ".\n" for _ in range(count)]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub._answers.cache_clear()
    yield
    hub._answers.cache_clear()


@pytest.fixture(scope="module")
def trained():
    """The tokenizer of an algorithm and a set of special tokens; training is done once for each."""
    made = {}

    def get(algorithm, special="gpt"):
        if (algorithm, special) not in made:
            options = Tokenizer(algorithm=algorithm, vocab_size=600)
            made[algorithm, special] = train(options, iter(texts() + EXAMPLES[:3]), special)
        return made[algorithm, special]

    return get


def run(code, *arguments, **environment):
    """What a fresh process prints as JSON."""
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    assert process.stdout.count("\n") == 1, "a progress bar belongs on a terminal only"
    return json.loads(process.stdout)


TRAIN_ALL = """
import hashlib, json, sys, tempfile
from pathlib import Path
from lm_lightning.data.tokenizer import Tokenizer, train
sys.path.insert(0, sys.argv[1])
from test_tokenizer import ALGORITHMS, EXAMPLES, texts

digests = {}
for special in ("gpt", "bert"):
    for algorithm in ALGORITHMS:
        tokenizer = train(Tokenizer(algorithm=algorithm, vocab_size=500), iter(texts() + EXAMPLES), special)
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            for file in sorted(Path(folder).iterdir()):
                digests[f"{special} {algorithm} {file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
print(json.dumps(digests))
"""


@pytest.mark.slow
def test_training_gives_the_same_files_in_every_process():
    here = str(Path(__file__).parent)
    first = run(TRAIN_ALL, here, PYTHONHASHSEED="1", RAYON_NUM_THREADS="1")
    second = run(TRAIN_ALL, here, PYTHONHASHSEED="2", RAYON_NUM_THREADS="4")
    assert first == second
    assert len([name for name in first if name.endswith(" tokenizer.json")]) == 2 * len(ALGORITHMS)


@pytest.mark.parametrize("special", ["gpt", "bert"])
@pytest.mark.parametrize("algorithm", EXACT)
def test_byte_level_tokenizers_give_back_any_text(trained, algorithm, special):
    tokenizer = trained(algorithm, special)
    for text in [*EXAMPLES, "unseen: ж ﷽ \u200d \x00 ▁ Ġ ##x"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize("special", ["gpt", "bert"])
def test_characters_are_single_tokens_and_unknown_ones_have_their_own(trained, special):
    tokenizer = trained("characters", special)
    for text in EXAMPLES[:3]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(text) and tokenizer.decode(ids) == text
    unknown = tokenizer("aжжb", add_special_tokens=False)["input_ids"][1:3]
    assert unknown == [tokenizer.unk_token_id] * 2 and tokenizer.unk_token_id != tokenizer.eos_token_id


def test_characters_beyond_the_vocabulary_are_the_rarest():
    tokenizer = train(Tokenizer(algorithm="characters", vocab_size=4), iter(["aaabbc"]), "gpt")
    assert tokenizer.get_vocab() == {"<|endoftext|>": 0, "<|unk|>": 1, "a": 2, "b": 3}


def test_wordpiece_normalizes_like_bert():
    corpus = texts() + ["Café 你好"] * 5
    cased = train(Tokenizer(algorithm="wordpiece", vocab_size=600), iter(corpus), "bert")
    lowered = train(Tokenizer(algorithm="wordpiece", vocab_size=600, lowercase=True), iter(corpus), "bert")

    def decode(tokenizer, text):
        return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])

    assert decode(cased, "the London  cat\u0000\r\n") == "the London cat"
    assert decode(lowered, "the London Café") == "the london cafe"
    assert cased.tokenize("你好") == ["你", "好"]
    assert decode(cased, "ж") == "[UNK]"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_special_tokens_in_a_text_are_text(trained, algorithm, tmp_path):
    for special in ("gpt", "bert"):
        tokenizer = trained(algorithm, special)
        tokenizer.save_pretrained(tmp_path / special)
        for used in (tokenizer, load(str(tmp_path / special))):
            for text in ("a<|endoftext|>b", "a[SEP]b", "[MASK]"):
                ids = used(text, add_special_tokens=False)["input_ids"]
                control = set(used.all_special_ids) - {used.unk_token_id}
                assert not control & set(ids)
                assert ids == used.backend_tokenizer.encode(text, add_special_tokens=False).ids
                assert algorithm not in EXACT or used.decode(ids) == text


RELOAD = """
import json, sys
from transformers import AutoTokenizer
folder, texts = sys.argv[1], json.loads(sys.argv[2])
print(json.dumps([AutoTokenizer.from_pretrained(f"{folder}/{name}")(texts)["input_ids"] for name in sys.argv[3:]]))
"""


@pytest.mark.slow
def test_a_saved_tokenizer_is_read_by_transformers_alone(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = [f"{algorithm}-{special}" for algorithm in ALGORITHMS for special in ("gpt", "bert")]
    tokenizers = [trained(*name.split("-")) for name in names]
    for tokenizer, name in zip(tokenizers, names, strict=True):
        tokenizer.save_pretrained(tmp_path / name)
        assert fingerprint(load(f"~/{name}")) == fingerprint(tokenizer)
    ids = run(RELOAD, str(tmp_path), json.dumps(EXAMPLES), *names)
    assert ids == [tokenizer(EXAMPLES)["input_ids"] for tokenizer in tokenizers]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_special_tokens(trained, algorithm):
    gpt = trained(algorithm)
    assert gpt.bos_token_id == gpt.eos_token_id == gpt.pad_token_id == 0
    assert gpt.unk_token == ("<|unk|>" if algorithm in ("wordpiece", "characters") else None)
    assert set(gpt("the cat")) == {"input_ids", "attention_mask"} and 0 not in gpt("the cat")["input_ids"]

    bert = trained(algorithm, "bert")
    assert bert.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    one, two = (bert(text, add_special_tokens=False)["input_ids"] for text in ("the cat", "a dog"))
    assert bert("the cat")["input_ids"] == [2, *one, 3]
    pair = bert("the cat", "a dog")
    assert pair["input_ids"] == [2, *one, 3, *two, 3]
    assert pair["token_type_ids"] == [0] * (len(one) + 2) + [1] * (len(two) + 1)
    assert len(gpt) <= 600 and len(bert) <= 600


def test_long_texts_give_no_warning(trained, tmp_path, caplog):
    trained("bpe").save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert len(load(str(tmp_path))("the cat " * 100_000)["input_ids"]) >= 100_000
    assert not caplog.records


def test_fingerprint_is_of_the_ids_only(trained):
    tokenizer = trained("bpe", "bert")
    before = fingerprint(tokenizer)
    tokenizer(["the cat", "a"], padding="max_length", truncation=True, max_length=5)
    assert fingerprint(tokenizer) == before
    options = Tokenizer(vocab_size=599)
    assert fingerprint(train(options, iter(texts()), "bert")) != before
    tokenizer = train(options, iter(texts()), "gpt")
    before = fingerprint(tokenizer)
    tokenizer.pad_token = None
    assert fingerprint(tokenizer) != before


def test_document_ids(trained):
    from tokenizers.processors import TemplateProcessing

    assert document_ids(trained("bpe")) == ([], [0])  # GPT-2's way: the text's end is also its beginning
    assert document_ids(trained("wordpiece", "bert")) == ([], [3])

    llama = train(Tokenizer(algorithm="bytes"), iter(texts()), "gpt")
    llama.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    begin, end = llama.convert_tokens_to_ids(["<s>", "</s>"])
    assert document_ids(llama) == ([], [end])  # it has a token for the beginning, but does not put it there
    llama.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    assert document_ids(llama) == ([begin], [end])

    llama.eos_token = None
    with pytest.raises(UserError, match="eos_token"):
        document_ids(llama)


@pytest.mark.parametrize(
    ("options", "corpus", "message"),
    [
        (Tokenizer(vocab_size=256), texts(1), "vocab_size 256 .* at least 257"),
        (Tokenizer(algorithm="bytes", vocab_size=256), texts(1), "at least 257"),
        (Tokenizer(algorithm="unigram", vocab_size=257), texts(1), "at least 258"),
        (Tokenizer(algorithm="wordpiece", vocab_size=9), texts(1), "vocab_size 9 .* at least"),
        (Tokenizer(algorithm="characters", vocab_size=2), texts(1), "at least 3"),
        (Tokenizer(lowercase=True), texts(1), "lowercase is only for the algorithm wordpiece"),
        (Tokenizer(), [], "no text"),
        (Tokenizer(algorithm="wordpiece"), ["", " \n"], "no text"),
    ],
)
def test_what_cannot_be_trained_is_refused(options, corpus, message):
    with pytest.raises(UserError, match=message):
        train(options, iter(corpus), "gpt")


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_the_smallest_vocabulary_is_the_alphabet(algorithm):
    least = 257 if algorithm == "bpe" else 258
    assert len(train(Tokenizer(algorithm=algorithm, vocab_size=least), iter(texts()), "gpt")) == least


def test_training_text_is_limited_and_that_is_said(caplog):
    options = Tokenizer(algorithm="characters", training_megabytes=1)
    corpus = iter(["a" * 600_000, "é" * 300_000, "c"])
    tokenizer = train(options, corpus, "gpt")
    assert "first 1 MB of text: 1 documents" in caplog.text
    assert set(tokenizer.get_vocab()) == {"<|endoftext|>", "<|unk|>", "a", "é"}
    assert next(corpus) == "c", "no more than needed is read"
    caplog.clear()
    train(options, iter(["a" * 1_000_000]), "gpt")
    train(Tokenizer(algorithm="bytes", training_megabytes=1), iter(["a" * 1_000_001]), "gpt")
    assert not caplog.records


def test_a_missing_folder_is_called_that(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for name in (str(tmp_path / "missing"), "./missing", "runs/missing", "~/no/such/folder"):
        with pytest.raises(UserError, match="the folder .* does not exist"):
            load(name)


def test_a_folder_without_a_usable_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be loaded"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="contains no tokenizer"):
        load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"damaged": true}')
    with pytest.raises(UserError, match="cannot be loaded"):
        load(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    with pytest.raises(UserError, match="ByT5Tokenizer, which has no fast version"):
        load(str(tmp_path))


def test_hub_names_offline():
    with pytest.raises(UserError, match="neither a local folder nor in the local Hub cache, and HF_HUB_OFFLINE is set"):
        load("no-such-owner/no-such-tokenizer")


def test_an_unreachable_hub_is_given_up_soon_and_once(monkeypatch):
    attempts, ended = [], threading.Event()

    def hang(*arguments):
        attempts.append(arguments)
        ended.wait()
        raise ConnectionRefusedError

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(hub.socket, "create_connection", hang)
    monkeypatch.setattr(hub, "TIMEOUT", 0.2)
    for _ in range(2):
        with pytest.raises(
            UserError, match="'gpt2' is neither a local folder .* https?://.* cannot be reached"
        ) as error:
            load("gpt2")
        assert "\n" not in str(error.value)
    assert len(attempts) == 1 and not ended.is_set()  # the connection still hangs
    ended.set()


def test_the_hub_is_asked_only_when_needed(monkeypatch, tmp_path):
    def refuse(*arguments):
        raise ConnectionRefusedError

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.socket, "create_connection", refuse)
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy:3128", "http": "http://proxy:3128"})
    assert not hub.local_only("gpt2"), "behind a proxy, a direct connection says nothing"
    assert hub.local_only(str(tmp_path)) and hub.local_only("./missing")
    hub._answers.cache_clear()
    monkeypatch.setattr(hub, "getproxies", lambda: {"no": "localhost"})
    assert hub.local_only("gpt2")


def test_importing_the_module_is_cheap():
    code = "import json, sys, lm_lightning.data.tokenizer; print(json.dumps(list(sys.modules)))"
    assert not {"torch", "transformers", "tokenizers"} & set(run(code))
