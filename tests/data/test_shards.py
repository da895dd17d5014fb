"""Shards: the tokens of every document, made once and found again."""

import gzip
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lm_lightning.data import corpus as corpora
from lm_lightning.data import shards
from lm_lightning.data.corpus import Corpus, Piece
from lm_lightning.data.tokenizer import Tokenizer
from lm_lightning.errors import UserError

BYTES = Tokenizer(algorithm="bytes", vocab_size=300)  # the quickest to make
TEXTS = {
    "train": ["The cat sat on the mat.", "naïve café, 你好 and 🙂", "a\n\n  b", "x"],
    "validation": ["A dog, though, did not.", "The end"],
    "test": ["Only one: the last"],
}


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def write(tmp_path, texts=TEXTS):
    """Write each text as a file of its split and return the corpus of all of them."""
    for split, documents in texts.items():
        (tmp_path / split).mkdir(exist_ok=True)
        for number, text in enumerate(documents):
            (tmp_path / split / f"{number}.txt").write_text(text, newline="")
    paths, validation, test = ([str(tmp_path / split)] if texts.get(split) else [] for split in shards.SPLITS)
    return Corpus(paths, validation, test, document="file")


def only_train(**options):
    """Options of a corpus without validation and test documents."""
    return {"validation_fraction": 0, "test_fraction": 0, **options}


def documents(prepared, name):
    """The tokens of each document of a split."""
    split = prepared.split(name)
    assert list(split.documents[:1]) in ([], [0]) and (np.diff(split.documents) > 0).all()
    return [list(tokens) for tokens in np.split(split.tokens, split.documents[1:])] if len(split.documents) else []


def by_hand(tokenizer, texts):
    """The tokens that each document should have."""
    return [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in texts]


def files(folder):
    """All files below a folder, with what tells whether one was written again."""
    stats = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: (stat.st_ino, stat.st_mtime_ns, stat.st_size) for path, stat in stats.items()}


def word_level(folder, vocabulary, **special):
    """Save a tokenizer that knows some words only."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "eos_token": "</s>", **special}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return str(folder)


# Tokens


@pytest.mark.parametrize("algorithm", ["bytes", "bpe"])
@pytest.mark.parametrize("at_once", [1, 30, 1 << 22])
def test_a_split_has_its_documents_tokens_each_with_an_end(tmp_path, cache, monkeypatch, algorithm, at_once):
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", at_once)
    options = Tokenizer(algorithm=algorithm, vocab_size=300)
    prepared = shards.prepare(write(tmp_path), options, shards.Layout(), str(cache))
    for name, texts in TEXTS.items():
        assert documents(prepared, name) == by_hand(prepared.tokenizer, texts)
        assert prepared.split(name).bytes == sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("at_once", [1, 1 << 22])
def test_a_document_that_comes_in_pieces_has_the_tokens_of_the_whole(tmp_path, cache, monkeypatch, at_once):
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", at_once)
    words = np.random.default_rng(0).choice(["the", "cat", "sat", "there.", "Don't", "é", "1984", "\n", "  "], 60_000)
    long = ("Once " + " ".join(words))[:199_999] + "."
    texts = {"train": ["before", long, "after"], "validation": [long]}
    assert sum(not piece.last for piece in corpora.read(write(tmp_path, texts), cache)) >= 6
    options = Tokenizer(algorithm="bpe", vocab_size=400)
    prepared = shards.prepare(write(tmp_path, texts), options, shards.Layout(), str(cache))
    for name in texts:
        assert documents(prepared, name) == by_hand(prepared.tokenizer, texts[name])


def test_pieces_of_documents_of_several_splits_stay_apart(cache, tmp_path, monkeypatch):
    """Whoever reads a corpus in parallel may mix the splits' pieces."""
    pieces = [("train", "a", False), ("test", "b", False), ("train", "c", True), ("test", "d", True)]
    monkeypatch.setattr(corpora, "read", lambda *_: (Piece(split, "", text, last) for split, text, last in pieces))
    prepared = shards.prepare(write(tmp_path), BYTES, shards.Layout(), str(cache))
    assert documents(prepared, "train") == by_hand(prepared.tokenizer, ["ac"])
    assert documents(prepared, "test") == by_hand(prepared.tokenizer, ["bd"])


def test_a_token_that_begins_texts_begins_each_document_but_not_each_piece(tmp_path, cache, monkeypatch):
    from tokenizers.processors import TemplateProcessing

    folder = word_level(tmp_path / "tokenizer", {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, bos_token="<s>")
    tokenizer = shards.tokenizers.load(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained(folder)
    pieces = [Piece("train", "", "a b", False), Piece("train", "", " a", True), Piece("train", "", "b", True)]
    monkeypatch.setattr(corpora, "read", lambda *_: iter(pieces))
    prepared = shards.prepare(write(tmp_path), Tokenizer(path=folder), shards.Layout(), str(cache))
    assert documents(prepared, "train") == [[1, 3, 4, 3, 2], [1, 4, 2]]


def test_an_end_token_written_in_a_text_ends_nothing(tmp_path, cache):
    texts = ["one<|endoftext|>two", "<|endoftext|>"]
    corpus = write(tmp_path, {"train": texts})
    corpus.validation_fraction = corpus.test_fraction = 0
    trained = shards.prepare(corpus, BYTES, shards.Layout(), str(cache))
    trained.tokenizer.save_pretrained(tmp_path / "saved")
    loaded = shards.prepare(corpus, Tokenizer(path=str(tmp_path / "saved")), shards.Layout(), str(cache))
    for prepared in (trained, loaded):
        tokens = prepared.split("train").tokens
        assert (tokens == prepared.tokenizer.eos_token_id).sum() == len(prepared.split("train").documents) == 2
        assert len(tokens) == sum(map(len, texts)) + 2


def test_a_split_without_documents_is_empty(tmp_path, cache):
    corpus = write(tmp_path, {"train": ["a", "b"]})
    corpus.validation_fraction = corpus.test_fraction = 0
    split = shards.prepare(corpus, BYTES, shards.Layout(), str(cache)).split("validation")
    assert len(split.tokens) == len(split.documents) == split.bytes == 0
    assert math.isnan(split.unigram_perplexity)


@pytest.mark.parametrize("size, dtype", [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_tokens_take_two_bytes_where_the_vocabulary_allows(tmp_path, cache, size, dtype):
    vocabulary = {"<unk>": 0, "</s>": 1} | {str(number): number for number in range(2, size)}
    folder = word_level(tmp_path / "tokenizer", vocabulary)
    corpus = write(tmp_path, {"train": [f"2 {size - 1}"], "validation": ["3"], "test": ["4"]})
    prepared = shards.prepare(corpus, Tokenizer(path=folder), shards.Layout(), str(cache))
    assert prepared.split("train").tokens.dtype == dtype
    assert documents(prepared, "train") == [[2, size - 1, 1]]


def test_a_tokenizer_that_was_saved_with_truncation_and_padding_loses_and_adds_nothing(tmp_path, cache):
    corpus = write(tmp_path)
    whole = shards.prepare(corpus, BYTES, shards.Layout(), str(cache))
    whole.tokenizer.backend_tokenizer.enable_truncation(8)
    whole.tokenizer.backend_tokenizer.enable_padding(length=8)
    whole.tokenizer.save_pretrained(tmp_path / "saved")
    prepared = shards.prepare(corpus, Tokenizer(path=str(tmp_path / "saved")), shards.Layout(), str(tmp_path / "other"))
    assert documents(prepared, "train") == documents(whole, "train")


def test_ids_of_a_vocabulary_may_have_gaps(tmp_path, cache):
    folder = word_level(tmp_path / "tokenizer", {"<unk>": 0, "a": 1, "b": 2, "</s>": 70_000})
    corpus = write(tmp_path, {"train": ["a"], "validation": ["a"], "test": ["a"]})
    prepared = shards.prepare(corpus, Tokenizer(path=folder), shards.Layout(), str(cache))
    assert documents(prepared, "train") == [[1, 70_000]]


# Unigram perplexity


def test_unigram_perplexity_counts_each_token_once_more():
    """4, 2 and 1 of 7: the geometric mean of 7/4 and 7/1 is 7/2."""
    assert shards.unigram_perplexity(np.array([3, 1, 0]), np.array([1, 0, 1])) == pytest.approx(3.5)
    assert shards.unigram_perplexity(np.array([5, 5]), np.array([1, 3])) == pytest.approx(2)


def test_unigram_perplexity_of_each_split_is_under_the_training_frequencies(tmp_path, cache):
    prepared = shards.prepare(write(tmp_path), BYTES, shards.Layout(), str(cache))
    frequencies = Counter(prepared.split("train").tokens.tolist())
    total = frequencies.total() + len(prepared.tokenizer)
    for name in shards.SPLITS:
        split = prepared.split(name)
        nats = -sum(math.log((frequencies[token] + 1) / total) for token in split.tokens.tolist()) / len(split.tokens)
        assert split.unigram_perplexity == pytest.approx(math.exp(nats))


# The cache


def test_a_second_run_reads_and_writes_nothing(tmp_path, cache, monkeypatch):
    corpus = write(tmp_path)
    first = shards.prepare(corpus, BYTES, shards.Layout(), str(cache))
    before = files(cache)
    monkeypatch.setattr(corpora, "read", None)
    second = shards.prepare(corpus, BYTES, shards.Layout(), str(cache))
    assert second.folder == first.folder and second.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    locks = {path for path in before if path.suffix == ".lock"}
    assert {path: files(cache)[path] for path in before.keys() - locks} == {
        path: before[path] for path in before.keys() - locks
    }
    assert files(cache).keys() == before.keys()


def test_a_moved_corpus_is_found_again(tmp_path, cache):
    first = shards.prepare(write(tmp_path), BYTES, shards.Layout(), str(cache))
    for split in shards.SPLITS:
        (tmp_path / split).rename(tmp_path / f"moved-{split}")
    moved = [[str(tmp_path / f"moved-{split}")] for split in shards.SPLITS]
    assert shards.prepare(Corpus(*moved, document="file"), BYTES, shards.Layout(), str(cache)).folder == first.folder


def test_whatever_decides_the_tokens_makes_new_shards(tmp_path, cache):
    texts = {"train": [f"text {number}" for number in range(40)]}

    def folder(options=BYTES, **settings):
        corpus = Corpus([str(tmp_path / "train")], **settings)
        return shards.prepare(corpus, options, shards.Layout(), str(cache)).folder

    write(tmp_path, texts)
    folders = [
        folder(),
        folder(validation_fraction=0.2),
        folder(test_fraction=0.2),
        folder(document="line"),
        folder(Tokenizer(algorithm="characters")),
    ]
    changed = tmp_path / "train" / "7.txt"
    changed.write_text("text _")
    os.utime(changed, (1, 1))
    folders.append(folder())
    (tmp_path / "train" / "8.txt").unlink()
    folders.append(folder())
    assert len(set(folders)) == len(folders)
    assert sorted(path.name for path in (cache / "shards").iterdir()) == sorted(path.name for path in folders)


def test_a_loaded_tokenizer_with_the_same_ids_shares_the_shards(tmp_path, cache):
    corpus = write(tmp_path)
    trained = shards.prepare(corpus, BYTES, shards.Layout(), str(cache))
    trained.tokenizer.save_pretrained(tmp_path / "saved")
    assert (
        shards.prepare(corpus, Tokenizer(path=str(tmp_path / "saved")), shards.Layout(), str(cache)).folder
        == trained.folder
    )


def test_an_error_leaves_nothing_and_the_next_run_succeeds(tmp_path, cache, monkeypatch):
    """The last file is damaged at its end, so most of the corpus is tokenized before that is noticed."""
    corpus = write(tmp_path, {"train": TEXTS["train"], "validation": ["a"], "test": ["b"]})
    damaged = tmp_path / "train" / "last.txt.gz"
    whole = gzip.compress(b"The last text")
    damaged.write_bytes(whole[:-8])
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 1)
    with pytest.raises(UserError, match="last.txt.gz"):
        shards.prepare(corpus, BYTES, shards.Layout(), str(cache))
    assert list((cache / "shards").iterdir()) == []

    damaged.write_bytes(whole)
    prepared = shards.prepare(corpus, BYTES, shards.Layout(), str(cache))
    assert documents(prepared, "train") == by_hand(prepared.tokenizer, [*TEXTS["train"], "The last text"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_leaves_nothing(tmp_path, cache, monkeypatch, error):
    corpus, read = write(tmp_path), corpora.read

    def interrupted(*arguments):
        yield next(read(*arguments))
        raise error

    monkeypatch.setattr(corpora, "read", interrupted)
    for options in (BYTES, Tokenizer(algorithm="characters")):
        with pytest.raises(error):
            shards.prepare(corpus, options, shards.Layout(), str(cache))
    kept = [path.parent.name for path in cache.rglob("*") if path.name == "tokenizer.json"]
    assert set(kept) == {path.name for path in (cache / "tokenizers").iterdir()}  # `bytes` does not read the texts
    assert len(set(kept)) == 1
    assert list((cache / "shards").iterdir()) == []


def test_what_a_killed_run_has_left_is_removed(tmp_path, cache):
    corpus = write(tmp_path)
    folder = shards.prepare(corpus, BYTES, shards.Layout(), str(cache)).folder
    killed = folder.with_name(f"{folder.name}.elsewhere-1-00000000.partial")
    folder.rename(killed)
    assert shards.prepare(corpus, BYTES, shards.Layout(), str(cache)).folder == folder
    assert list((cache / "shards").iterdir()) == [folder]


def set_gate(barrier):
    global gate
    gate = barrier


def prepare_slowly(corpus, cache):
    """Prepare a corpus that takes long to read; returns the folder and how often it was read."""
    reads, read = [], corpora.read

    def slowly(*arguments):
        reads.append(1)
        time.sleep(0.5)
        return read(*arguments)

    corpora.read = slowly
    gate.wait(60)
    prepared = shards.prepare(corpus, Tokenizer(algorithm="characters"), shards.Layout(), cache)
    return prepared.folder, documents(prepared, "train"), len(reads)


@pytest.mark.slow
def test_of_two_processes_one_works_and_both_have_the_result(tmp_path, cache):
    context = multiprocessing.get_context("spawn")
    corpus = write(tmp_path)
    with ProcessPoolExecutor(2, context, set_gate, (context.Barrier(2),)) as pool:
        futures = [pool.submit(prepare_slowly, corpus, str(cache)) for _ in range(2)]
        (folder, tokens, reads), (other_folder, other_tokens, other_reads) = (future.result() for future in futures)
    assert folder == other_folder and tokens == other_tokens and len(tokens) == 4
    assert reads + other_reads == 2, "the corpus is read for the tokenizer once and for the tokens once"
    assert list((cache / "shards").iterdir()) == [folder]
    assert len(list((cache / "tokenizers").iterdir())) == 1


# A cache that is shared, or damaged


@pytest.mark.parametrize("name", ["train.tokens", "train.documents", "frequencies.npy", "info.json"])
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_damaged_shards_are_refused_and_named(name: str, damage: str, tmp_path: Path, cache: Path):
    prepared = shards.prepare(write(tmp_path), BYTES, shards.Layout(), str(tmp_path / "cache"))
    file = prepared.folder / name
    content = file.read_bytes()
    half = len(content) // 2
    file.write_bytes(content[:half] if damage == "cut" else content[:half] + b"\xff" + content[half + 1 :])
    with pytest.raises(UserError, match=f"{name}.*remove the folder {prepared.folder}"):
        shards.prepare(write(tmp_path), BYTES, shards.Layout(), str(tmp_path / "cache"))


def test_copied_shards_are_used(tmp_path: Path):
    first = shards.prepare(write(tmp_path), BYTES, shards.Layout(), str(tmp_path / "cache"))
    shutil.copytree(tmp_path / "cache", tmp_path / "copy")  # with other modification times
    for file in (tmp_path / "copy").rglob("*.tokens"):
        os.utime(file)
    copied = shards.prepare(write(tmp_path), BYTES, shards.Layout(), str(tmp_path / "copy"))
    assert copied.split("train").tokens.tolist() == first.split("train").tokens.tolist()


@pytest.mark.slow
def test_another_user_reads_a_cache_and_is_told_if_it_cannot_be_written(tmp_path: Path):
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    code = """
import os, sys
from lm_lightning.data import corpus, shards, tokenizer
from lm_lightning.errors import UserError
for number, text in enumerate(sys.argv[2:]):
    if number == 1:  # (by now, all is imported that root alone may read here)
        os.setuid(65534)
    try:
        options = corpus.Corpus(paths=[text], validation_fraction=0)
        prepared = shards.prepare(options, tokenizer.Tokenizer(vocab_size=300), shards.Layout(), sys.argv[1])
        print(len(prepared.split("train").tokens))
    except UserError as error:
        print(error)
"""
    with tempfile.TemporaryDirectory() as name:  # (those of pytest are for their owner alone)
        folder = Path(name)
        folder.chmod(0o755)
        for file in ("known.txt", "new.txt"):
            (folder / file).write_text(f"Some words of {file}. " * 30)
        corpus = Corpus(paths=[str(folder / "known.txt")], validation_fraction=0)
        prepared = shards.prepare(corpus, Tokenizer(vocab_size=300), shards.Layout(), str(folder / "cache"))
        tokens = len(prepared.split("train").tokens)
        arguments = [sys.executable, "-c", code, folder / "cache"]
        arguments += [folder / "known.txt", folder / "known.txt", folder / "new.txt"]
        done = subprocess.run(arguments, capture_output=True, text=True, cwd="/")
    assert not done.returncode, done.stderr
    _, known, new = done.stdout.splitlines()
    assert int(known) == tokens
    assert "cannot be written ([Errno 13] Permission denied" in new and "--data.cache_dir" in new


@pytest.mark.slow
def test_a_lock_that_another_process_holds_is_announced(tmp_path: Path, capsys):
    corpus = write(tmp_path)
    folder = shards.prepare(corpus, BYTES, shards.Layout(), str(tmp_path / "cache")).folder
    shutil.rmtree(folder)
    code = f"""
import filelock, time
with filelock.FileLock({str(tmp_path / "cache" / "locks" / folder.name) + ".lock"!r}):
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    threading.Timer(5, holder.kill).start()  # whose lock ends with it
    shards.prepare(corpus, BYTES, shards.Layout(), str(tmp_path / "cache"))
    assert "waiting for another process that is tokenizing the corpus" in capsys.readouterr().err
    assert folder.is_dir()


def test_without_locks_the_first_result_stays(tmp_path: Path, monkeypatch):
    def unsupported(*_: object, **__: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("filelock.FileLock.acquire", unsupported)
    corpus, tokenize = write(tmp_path), shards.tokenize

    def overtaken(*args: object) -> None:  # another host, whose lock is not seen here, is faster
        monkeypatch.setattr(shards, "tokenize", tokenize)
        other = shards.prepare(corpus, BYTES, shards.Layout(), str(tmp_path / "cache"))
        (other.folder / "first").touch()
        tokenize(*args)

    monkeypatch.setattr(shards, "tokenize", overtaken)
    folder = shards.prepare(corpus, BYTES, shards.Layout(), str(tmp_path / "cache")).folder
    assert (folder / "first").exists() and not list(folder.parent.glob("*.partial"))
