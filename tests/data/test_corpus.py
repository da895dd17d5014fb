import contextlib
import csv
import gzip
import io
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_lightning.data import corpus as corpora
from lm_lightning.data.corpus import Corpus, Piece, inputs, read, total_bytes
from lm_lightning.errors import UserError

LINES = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\n\r\ufeff"), max_size=20))
MODES = st.sampled_from(["file", "paragraph", "line"])


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    """One cache of the built-in corpus, which takes seconds to make."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all examples of a property."""
    return tmp_path_factory.mktemp("property")


def documents(*paths, **options):
    """Return the texts of all documents."""
    return [text for _, text in named_documents(*paths, **options)]


def named_documents(*paths, **options):
    """Return the `(split, text)` of all documents, after checking how their pieces fit together."""
    result, parts = [], []
    for piece in read(Corpus([str(path) for path in paths], **options), Path("unused")):
        assert 0 < len(piece.text) <= 65536
        parts.append(piece)
        if piece.last:
            assert len({(part.split, part.name) for part in parts}) == 1
            result.append((piece.split, "".join(part.text for part in parts)))
            parts = []
    assert not parts, "the last document does not end"
    return result


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def write_rows(path, rows):
    """Write rows in the format of the path's suffixes."""
    form, _, compression = path.name.partition(".")[2].partition(".")
    if form == "parquet":
        import pyarrow
        from pyarrow import parquet

        plain = path.with_suffix(".plain")
        parquet.write_table(pyarrow.Table.from_pylist(rows), plain)
        data = plain.read_bytes()
        plain.unlink()
    elif form == "jsonl":
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    else:
        with open(path, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, rows[0], delimiter={"csv": ",", "tsv": "\t"}[form])
            writer.writeheader()
            writer.writerows(rows)
        data = path.read_bytes()
    return write(path, compress(data, compression))


def compress(data, compression):
    if compression == "gz":
        return gzip.compress(data)
    return zstandard.ZstdCompressor().compress(data) if compression else data


def error_of(*paths, **options):
    with pytest.raises(UserError) as caught:
        documents(*paths, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Plain text


def test_what_a_document_is(tmp_path):
    path = write(tmp_path / "a.txt", "\n\none\ntwo\n \t\n\nthree\n")
    assert documents(path, document="file") == ["one\ntwo\n \t\n\nthree"]
    assert documents(path, document="paragraph") == ["one\ntwo", "three"]
    assert documents(path, document="line") == ["one", "two", "three"]


@given(LINES, MODES, st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans())
@settings(deadline=None)
def test_line_ends_and_the_byte_order_mark_do_not_matter(folder, lines, mode, end, mark, last):
    text = end.join(lines) + end * last
    path = write(folder / "a.txt", text.encode("utf-8-sig" if mark else "utf-8"))
    filled = [line for line in lines if line.strip()]
    if not filled:
        assert "no text" in error_of(path, document=mode)
    elif mode == "line":
        assert documents(path, document=mode) == filled
    elif mode == "file":
        first = lines.index(filled[0])
        expected = "\n".join(lines[first:])
        assert documents(path, document=mode) in ([expected], [expected.removesuffix("\n")])
    else:
        found = documents(path, document=mode)
        assert "\n".join(found).split("\n") == filled
        assert len(found) == sum(
            bool(a.strip()) and not b.strip() for a, b in zip(lines, lines[1:] + [""], strict=True)
        )


@given(st.binary(max_size=60), MODES, st.sampled_from(["strict", "replace"]))
@settings(deadline=None)
def test_any_bytes_are_documents_or_a_user_error(folder, data, mode, errors):
    path = write(folder / "b.txt", data)
    try:
        texts = documents(path, document=mode, encoding_errors=errors)
    except UserError:
        return
    assert all(text.encode() for text in texts)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.parquet", "a.txt.gz", "a.txt.zst", "a.parquet.gz"])
@given(data=st.binary(max_size=60))
@settings(deadline=None, max_examples=30)
def test_any_bytes_in_any_format_are_documents_or_a_user_error(folder, name, data):
    path = write(folder / name, data)
    try:
        documents(path)
    except UserError as error:
        assert path.name in str(error) or "no text" in str(error)


@pytest.mark.parametrize(
    ("text", "encoding", "line"), [("one\nzwölf\n", "latin-1", 2), ("one\n", "utf-16", 1), ("one\n", "utf-16-le", 1)]
)
def test_other_encodings_are_errors_with_their_place(tmp_path, text, encoding, line):
    path = write(tmp_path / "a.txt", text.encode(encoding))
    assert f"{path}:{line}:" in error_of(path)


@given(st.lists(st.text(max_size=5), min_size=1, max_size=8))
@settings(deadline=None, max_examples=50)
def test_every_row_is_a_document_or_counted(folder, texts):
    path = write_rows(folder / "rows.jsonl", [{"text": text} for text in texts])
    filled = [text for text in texts if text.strip()]
    with contextlib.redirect_stderr(io.StringIO()) as told:
        found = documents(path) if filled else error_of(path)
    assert found == filled or (not filled and "no text" in found)
    left = len(texts) - len(filled)
    assert (f"{left} rows without text" in told.getvalue()) == bool(left and filled)


def test_only_the_line_feed_ends_a_line(tmp_path):
    text = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\rh"
    assert documents(write(tmp_path / "a.txt", text), document="line") == [text]


def test_a_bad_byte_is_an_error_with_its_place(tmp_path):
    path = write(tmp_path / "a.txt", b"good\n\xc3\xa9t\xe9 \n")
    message = error_of(path)
    assert f"{path}:2: byte 0xe9 at column 3 is not UTF-8" in message
    assert "--data.corpus.encoding_errors replace" in message


def test_bad_bytes_can_be_replaced_and_are_counted(tmp_path, capsys):
    path = write(tmp_path / "a.txt", b"a\xff\xfeb\n\nc \xef\xbf\xbd\n")
    assert documents(path, encoding_errors="replace") == ["a\ufffd\ufffdb", "c \ufffd"]
    assert "2 invalid bytes" in capsys.readouterr().err
    assert documents(write(path, "fine"), encoding_errors="replace") == ["fine"]
    assert capsys.readouterr().err == ""


def test_a_long_line_is_an_error_with_the_remedy(tmp_path):
    path = write(tmp_path / "a.txt", "é" * 100 + "\n" + "x" * 101 + "\n")
    message = error_of(path, max_line=100)
    assert f"{path}:2: the line has 101 characters" in message
    assert "--data.corpus.max_line 0" in message
    assert documents(path, max_line=101, document="line") == documents(path, max_line=0, document="line")
    assert "has 200000 characters" in error_of(write(path, "x" * 200_000 + "\n"))


def test_lines_longer_than_a_piece_are_lines_all_the_same(tmp_path):
    for line in ("x" * 65535, "x" * 65536, " " * 65536 + "x", "x" * 65536 + " "):
        for end in ("\n", "\r\n"):
            path = write(tmp_path / "a.txt", f"one{end}{line}{end}two")
            assert documents(path, max_line=0) == [f"one\n{line}\ntwo"]
            assert documents(path, max_line=0, document="line") == ["one", line, "two"]
    assert "column 70001 is" in error_of(write(path, b"x" * 70_000 + b"\xff"), max_line=0)


# Pieces


def test_pieces_are_cut_where_no_tokenizer_joins(tmp_path):
    text = "don't stop 12 times, o_o  or naïve " * 10_000
    pieces = list(read(Corpus([str(write(tmp_path / "a.txt", text))], document="file", max_line=0), tmp_path))
    assert "".join(piece.text for piece in pieces) == text
    assert len(pieces) > 4
    for before, after in zip(pieces, pieces[1:], strict=False):
        assert before.text[-1].isalnum() and after.text[0] == " " and after.text[1].isalpha()
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]


@pytest.mark.parametrize(("unit", "ends"), [("abc,\n", "\n"), ("你好世界。", "。"), ("你好", "你好")])
def test_without_spaces_pieces_are_cut_after_line_breaks_or_punctuation(tmp_path, unit, ends):
    path = write(tmp_path / "a.txt", unit * 40_000)
    pieces = list(read(Corpus([str(path)], document="file", max_line=0), tmp_path))
    assert "".join(piece.text for piece in pieces) == (unit * 40_000).removesuffix("\n")
    assert len(pieces) > 1
    assert all(piece.text[-1] in ends for piece in pieces[:-1])


@given(
    st.lists(st.sampled_from(["word ", "字", "\n", "。", "1 ", "\r", "x" * 40_000, "字" * 70_000]), max_size=9), MODES
)
@settings(deadline=None, max_examples=40)
def test_cuts_depend_on_the_text_only(folder, units, mode):
    text = "".join(units)
    whole = list(corpora.cut([text]))
    assert "".join(piece for piece, _ in whole) == text
    assert list(corpora.cut(text[i : i + 1000] for i in range(0, len(text), 1000))) == whole
    lines = [line.removesuffix("\r") for line in text.split("\n")]  # what a "\r" before "\n" is: part of the line end
    if any(line.strip() for line in lines):
        found = documents(write(folder / "c.txt", text), document=mode, max_line=0)
        assert (
            "".join(found).replace("\n", "").strip()
            == "".join(line for line in lines if line.strip() or mode == "file").strip()
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "unit"), [("file", "some words\n"), ("paragraph", "some words\n"), ("line", "some words ")]
)
def test_a_huge_document_does_not_lie_in_memory(tmp_path, mode, unit):
    path = write(tmp_path / "a.txt", unit * 200_000)
    tracemalloc.start()
    for _ in read(Corpus([str(path)], document=mode, max_line=0), tmp_path):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6


# Rows


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("form", ["jsonl", "csv", "tsv", "parquet"])
def test_every_format_plain_and_compressed(tmp_path, form, compression):
    texts = ['one "quoted", word', "two\nlines\tand a tab", "é\u2028" + "x" * 200_000]
    path = write_rows(tmp_path / f"a.{form}{compression}", [{"id": "1", "text": text} for text in texts])
    assert documents(path, quoting=True if form == "tsv" else None) == texts


@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_compressed_text_of_several_frames_is_read_to_its_end(tmp_path, compression):
    data = compress(b"one\n", compression) + compress(b"two\n", compression)
    assert documents(write(tmp_path / f"A.TXT.{compression.upper()}", data), document="line") == ["one", "two"]


@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_a_truncated_or_damaged_file_is_an_error(tmp_path, compression):
    data = compress("".join(f"line {n * n}\n" for n in range(10_000)).encode(), compression)
    half = len(data) // 2
    for broken in (data[:half], data[:half] + b"\xff" * 100 + data[half + 100 :]):
        path = write(tmp_path / f"a.txt.{compression}", broken)
        assert f"{path} cannot be read" in error_of(path)


@pytest.mark.parametrize("form", ["jsonl", "csv", "tsv", "parquet"])
def test_a_missing_column_is_an_error_that_names_the_others(tmp_path, form):
    path = write_rows(tmp_path / f"a.{form}", [{"title": "a", "body": "words"}])
    message = error_of(path)
    assert str(path) in message and "title, body" in message and "--data.corpus.text_column" in message
    assert documents(path, text_column="body") == ["words"]
    assert "--data.corpus.name_column" in error_of(path, text_column="body", name_column="id")


@pytest.mark.parametrize(
    "line", ['{"text": ', "[]", '"text"', '{"text": 1}', '{"text": null}', "[" * 100_000, "1" * 9999]
)
def test_a_bad_json_line_is_an_error_with_its_number(tmp_path, line):
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n\n' + line + "\n")
    assert f"{path}:3: " in error_of(path)


def test_a_lone_surrogate_in_json_is_an_error_or_replaced(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a\\ud800"}')
    assert "U+D800" in error_of(path)
    assert documents(path, encoding_errors="replace") == ["a\ufffd"]
    assert documents(write(path, '{"text": "a", "id": "\\ud800"}'), name_column="id") == ["a"]


def test_a_csv_quote_that_is_never_closed_is_an_error(tmp_path):
    assert "not valid CSV" in error_of(write(tmp_path / "a.csv", 'text\n"open\nmore\n'))


def test_rows_without_text_are_skipped_and_counted(tmp_path, capsys):
    path = write_rows(tmp_path / "a.jsonl", [{"text": text} for text in ("", " \n", "words")])
    assert documents(path) == ["words"]
    assert "2 rows without text" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.parquet", "a.txt.zst"])
def test_a_missing_package_is_an_error_with_the_remedy(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert 'pip install -e ".[data]"' in error_of(write(tmp_path / name, "x"))


def test_importing_is_cheap():
    code = "import lm_lightning.data.corpus, sys; print({'torch', 'pyarrow', 'datasets', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


# Which files


def test_folders_and_patterns_are_read_in_order_and_every_file_once(tmp_path):
    for name in ("b.txt", "a.txt", "below/deep/c.txt", ".hidden/d.txt", "below/e.md"):
        write(tmp_path / name, name)
    everything = ["a.txt", "b.txt", "below/deep/c.txt", "below/e.md"]
    assert documents(tmp_path) == everything
    assert documents(tmp_path / "**/*.txt") == ["a.txt", "b.txt", "below/deep/c.txt"]
    assert documents(tmp_path / "b.txt", tmp_path / "*.txt", tmp_path) == ["b.txt", "a.txt", *everything[2:]]


def test_a_name_with_the_signs_of_a_pattern_is_a_name(tmp_path):
    write(tmp_path / "a[1]" / "b?.txt", "words")
    assert documents(tmp_path / "a[1]") == documents(tmp_path / "a[1]" / "b?.txt") == ["words"]


def test_paths_that_hold_nothing_are_errors(tmp_path):
    assert "nowhere.txt does not exist" in error_of(tmp_path / "nowhere.txt")
    assert "does not exist" in error_of("")
    assert "*.txt contains no files" in error_of(tmp_path / "*.txt")
    assert "contains no files" in error_of(tmp_path)
    assert "no text" in error_of(write(tmp_path / "empty.txt", "\n \n"))
    novel = write(tmp_path / "novel.txt", "words")
    assert error_of(tmp_path / "nvel.txt").endswith(f"nvel.txt does not exist: did you mean {novel}?")


# Splits


def split_of(found):
    """Return the set of texts of each split."""
    return {name: {text for split, text in found if split == name} for name in ("train", "validation", "test")}


def test_the_split_is_stable_and_about_as_large_as_asked(tmp_path):
    lines = [f"line {n}" for n in range(2000)]
    options = {"document": "line", "validation_fraction": 0.2, "test_fraction": 0.1}
    splits = split_of(named_documents(write(tmp_path / "a.txt", "\n".join(lines)), **options))
    assert 320 < len(splits["validation"]) < 480
    assert 140 < len(splits["test"]) < 260
    rows = [{"text": line} for line in reversed(lines)]
    assert split_of(named_documents(write_rows(tmp_path / "b.csv", rows), **options)) == splits
    assert sum(map(len, splits.values())) == len(lines)
    # The same on every machine and in every version, else test documents would move into the training split.
    assert "line 0" in splits["train"] and "line 1" in splits["test"] and "line 2" in splits["validation"]


def test_no_fraction_means_no_such_split(tmp_path):
    path = write(tmp_path / "a.txt", "\n".join(f"line {n}" for n in range(500)))
    found = named_documents(path, document="line", validation_fraction=0, test_fraction=0)
    assert {split for split, _ in found} == {"train"}


def test_files_and_names_decide_the_split_wherever_the_folder_is(tmp_path):
    for root in ("one", "two/three"):
        for n in range(100):
            write(tmp_path / root / "below" / f"{n}.txt", f"{root} {n}")
    options = {"document": "file", "validation_fraction": 0.3}
    one, two = (named_documents(tmp_path / root, **options) for root in ("one", "two/three"))
    assert [split for split, _ in one] == [split for split, _ in two]
    assert len({split for split, _ in one}) == 3
    assert sorted(named_documents(tmp_path / "one/**/*.txt", **options)) == sorted(one)


def test_rows_of_one_name_are_in_one_split(tmp_path):
    rows = [{"text": f"row {n}", "book": f"book {n % 40}"} for n in range(400)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    pieces = list(read(Corpus([str(path)], name_column="book", validation_fraction=0.3), tmp_path))
    assert len({(piece.split, piece.name) for piece in pieces}) == 40
    assert {piece.split for piece in pieces} == {"train", "validation", "test"}


def test_validation_and_test_files_take_the_place_of_the_hash(tmp_path):
    lines = "\n".join(f"line {n}" for n in range(300))
    train, validation = write(tmp_path / "a.txt", lines), write(tmp_path / "v.txt", "extra\nline 1")
    options = {"document": "line", "validation_paths": [str(validation)]}
    splits = split_of(named_documents(tmp_path, **options))  # the folder holds the validation file, too
    assert splits["validation"] == {"extra", "line 1"} and "extra" not in splits["train"]
    assert splits["test"]
    splits = split_of(named_documents(train, **options, test_paths=[str(train)]))
    assert not splits["train"] and len(splits["test"]) == 300
    splits = split_of(named_documents(train, document="line", test_paths=[str(validation)]))
    assert splits["test"] == {"extra", "line 1"} and splits["validation"]
    assert "both" in error_of(train, **options, test_paths=[str(validation)])


@pytest.mark.parametrize(("validation", "test"), [(-0.1, 0.1), (0.5, 0.5), (1.5, -1), (float("nan"), 0)])
def test_impossible_fractions_are_errors(tmp_path, validation, test):
    path = write(tmp_path / "a.txt", "words")
    assert "_fraction" in error_of(path, validation_fraction=validation, test_fraction=test)


# The built-in corpus, the Hub, and what is known beforehand


@pytest.mark.slow
def test_the_default_is_the_builtin_corpus(cache_dir):
    pieces = list(read(Corpus(), cache_dir))
    assert {piece.split for piece in pieces} == {"train", "validation", "test"}
    assert "stdlib/argparse.py" in {piece.name for piece in pieces}
    assert sum(len(piece.text.encode()) for piece in pieces) == total_bytes(Corpus(), cache_dir)
    description = inputs(Corpus(), cache_dir)
    assert json.loads(json.dumps(description)) == description
    assert len(description["builtin"][1]) == 64


@pytest.mark.slow
def test_inputs_change_with_the_files_and_options_only(tmp_path, cache_dir):
    path = write(tmp_path / "one" / "a.txt", "words")
    before = inputs(Corpus([str(path.parent)]), tmp_path)
    assert inputs(Corpus([str(path.parent)], streaming=False), tmp_path) == before
    assert inputs(Corpus([str(path.parent)], document="line"), tmp_path) != before
    assert inputs(Corpus([], validation_paths=[str(path)]), cache_dir) != before
    moved = path.parent.rename(tmp_path / "two")
    assert inputs(Corpus([str(moved)]), tmp_path) == before
    os.utime(moved / "a.txt", ns=(0, 0))  # only touched
    assert inputs(Corpus([str(moved)]), tmp_path) == before
    write(moved / "a.txt", "other")  # as long as before
    assert inputs(Corpus([str(moved)]), tmp_path) != before


def test_total_bytes_is_known_for_uncompressed_files(tmp_path):
    write(tmp_path / "a.txt", "é\n")
    assert total_bytes(Corpus([str(tmp_path)]), tmp_path) == 3
    write(tmp_path / "b.txt.gz", gzip.compress(b"words"))
    assert total_bytes(Corpus([str(tmp_path)]), tmp_path) is None
    assert total_bytes(Corpus(hub="any/name"), tmp_path) is None


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    import datasets

    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return [{"text": "one"}, {"text": "two"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = Corpus(hub="any/name", hub_config="small", hub_revision="v1", streaming=False)
    pieces = list(read(corpus, tmp_path))
    assert pieces == [Piece("train", "any/name:1", "one", True), Piece("train", "any/name:2", "two", True)]
    assert calls == [(("any/name", "small"), {"split": "train", "revision": "v1", "streaming": False})]
    assert "--data.corpus.text_column" in error_of(hub="any/name", streaming=False, text_column="body")


@pytest.mark.parametrize("streaming", [True, False])
def test_without_the_hub_there_is_an_error_at_once(tmp_path, streaming):
    code = f"""
from pathlib import Path
from lm_lightning.data.corpus import *
try:
    list(read(Corpus(hub="any/name", streaming={streaming}), Path()))
except UserError as error:
    print(error)
"""
    closed = {"HF_ENDPOINT": "http://127.0.0.1:9"} if streaming else {"HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, "HF_HOME": str(tmp_path), **closed}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert "'any/name' cannot be read" in done.stdout, done.stderr
