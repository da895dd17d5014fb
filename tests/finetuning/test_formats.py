"""Files as people have them: stray quotes, other delimiters, encodings and line ends are read rightly or refused."""

import json
import pydoc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import paragraphs

from lm_lightning.data.corpus import Corpus, inputs
from lm_lightning.data.corpus import read as read_corpus
from lm_lightning.errors import UserError
from lm_lightning.finetuning.tables import Tables, read_files
from lm_lightning.security.trust import PACKAGES


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def table(path: Path, **options) -> list[tuple[int, dict]]:
    """The rows of a table with the numbers of their lines."""
    return [(int(row.where.rsplit(":", 1)[1]), dict(row)) for row in read_files(str(path), Tables(**options))]


def texts(path: Path, **options) -> list[str]:
    """The documents of a corpus."""
    return [piece.text for piece in read_corpus(Corpus(str(path), **options), path.parent)]


ROWS = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]


def test_quotes_of_a_tsv_file_are_text_and_lines_are_rows(tmp_path: Path, capsys):
    lines = ["text\tlabel", 'a 5" pipe\tx', '"Great, he said\ty', '""\tz', 'the end"\tx']
    path = write(tmp_path / "a.tsv", "\n".join(lines) + "\n")
    expected = [dict(zip(("text", "label"), line.split("\t"))) for line in lines[1:]]
    assert table(path) == list(enumerate(expected, start=2))
    assert texts(path) == [row["text"] for row in expected]
    assert "1 rows have a cell that begins and ends with a quote, the first on line 4" in capsys.readouterr().out
    path = write(tmp_path / "b.tsv", 'text\tlabel\n"one\n\nrow"\tx\nb\ty\n')
    assert table(path, quoting=True) == [(2, {"text": "one\n\nrow", "label": "x"}), (5, ROWS[1])]
    with pytest.raises(UserError, match=r"b.tsv:2: 1 cells .separated by '\\t'., but the header has 2"):
        table(path)


def test_quotes_of_a_csv_file_that_span_lines_are_reported(tmp_path: Path, capsys):
    path = write(tmp_path / "a.csv", 'text,label\na,x\n"one\nrow",y\n\n"b, c",x\n"d\ne\nf",y\n')
    assert [number for number, _ in table(path)] == [2, 3, 6, 7]
    told = "2 rows have a quoted cell of several lines, the first on line 3"
    assert f"{path}: {told}; if these quotes are text, give --data.tables.quoting false" in capsys.readouterr().out
    assert texts(path) == ["a", "one\nrow", "b, c", "d\ne\nf"]
    assert f"{told}; if these quotes are text, give --data.corpus.quoting false" in capsys.readouterr().err
    path = write(tmp_path / "b.csv", 'text,label\na,x\n"open,y\nb,x\nc,y\n')
    with pytest.raises(UserError, match="b.csv:3: .* is not valid CSV .* --data.tables.quoting false"):
        table(path)
    assert table(path, quoting=False)[1] == (3, {"text": '"open', "label": "y"})


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_other_delimiters_of_a_csv_file_are_detected_and_reported(tmp_path: Path, delimiter: str, capsys):
    content = f'text{delimiter}label\n"a, {delimiter}"{delimiter}x\nb{delimiter}y\n'
    path = write(tmp_path / "a.csv", content)
    assert [row["text"] for _, row in table(path)] == [f"a, {delimiter}", "b"]
    assert f"the columns are separated by {delimiter!r} (--data.tables.delimiter" in capsys.readouterr().out
    assert texts(path)[1] == "b"
    assert f"the columns are separated by {delimiter!r} (--data.corpus.delimiter" in capsys.readouterr().err
    bare = write(tmp_path / "b.csv", content.split("\n", 1)[1].replace(", ", " "))
    assert table(bare, header=["text", "label"])[1] == (2, ROWS[1])


def test_a_delimiter_that_cannot_be_detected_is_named(tmp_path: Path):
    path = write(tmp_path / "a.csv", "text;a,b;label\nx;1,2;y\n")
    (row,) = read_files(str(path), Tables())
    with pytest.raises(UserError, match="no column 'text'; .* if ';' separates .* give --data.tables.delimiter ';'"):
        row.text("text")
    with pytest.raises(UserError, match="if ';' separates .* give --data.corpus.delimiter ';'"):
        texts(path)
    assert table(path, delimiter=";") == [(2, {"text": "x", "a,b": "1,2", "label": "y"})]
    with pytest.raises(UserError, match=r"a.csv:1: 2 cells .separated by ','., but the header has 3"):
        table(path, header=["text", "number", "label"])
    with pytest.raises(UserError, match="--data.tables.delimiter is ';;'"):
        table(path, delimiter=";;")


@pytest.mark.parametrize(
    "content",
    [
        "\ufefftext,label\r\na,x\r\nb,y\r\n",
        '\ufeff"text","label"\na,x\nb,y',
        "\n\ntext,label\n\na,x\n  \nb,y\n\n",
        " text , label \na,x\nb,y\n",
        "text,label,\na,x,\nb,y,\n",
        "text,label\na,x,\nb,y,,\n",
        "text,label,,\na,x\nb,y,\n",
    ],
    ids=["BOM and CRLF", "BOM and quotes", "blank lines", "spaces in the header", "delimiters at the end", "3", "4"],
)
def test_harmless_differences_do_not_matter(tmp_path: Path, content: str):
    path = write(tmp_path / "a.csv", content)
    assert [row for _, row in table(path)] == ROWS
    assert texts(path) == ["a", "b"]
    lines = content.removeprefix("\ufeff").split("\n")
    assert [number for number, _ in table(path)] == [
        1 + next(i for i, line in enumerate(lines) if line.startswith(start)) for start in ("a,", "b,")
    ]


def test_two_columns_of_one_name_are_refused(tmp_path: Path):
    path = write(tmp_path / "a.csv", "text,label,text\na,x,b\n")
    for read in (table, texts):
        with pytest.raises(UserError, match="a.csv:1: 2 columns are called 'text'"):
            read(path)
    assert table(write(path, ",text,,label\n0,a,,x\n"))[0][1] == {"": "", **ROWS[0]}  # pandas' index has no name


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.csv", "text,label\ra,x\rb,y\r", 1),
        ("a.csv", "text,label\na,x\nb\rc,y\n", 3),
        ("a.tsv", "text\tlabel\ra\tx\rb\ty\r", 1),
        ("a.tsv", "text\tlabel\na\tx\n\nb\rc\ty\n", 4),
        ("a.jsonl", '{"text": "a"}\r{"text": "b"}\r', 1),
        ("a.conll", "a O\nb\rO\n", 2),
    ],
)
def test_a_carriage_return_alone_is_refused_with_its_line(tmp_path: Path, name: str, content: str, line: int):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=f"{name}:{line}: the line contains a carriage return .CR."):
        table(path)
    if not name.endswith("conll"):
        with pytest.raises(UserError, match=f"{name}:{line}: the line contains a carriage return .CR."):
            texts(path)


def test_a_text_whose_lines_end_with_carriage_returns_is_not_called_prose(tmp_path: Path):
    path = write(tmp_path / "a.txt", "words and words\r" * 5000)
    with pytest.raises(UserError, match=r"a.txt:1: the line has 80000 characters.*; its lines end with CR alone"):
        texts(path)


@pytest.mark.parametrize(("encoding", "problem"), [("cp1252", "byte 0xe9"), ("utf-16", "a NUL byte")])
def test_an_encoding_is_named_or_refused_with_an_option_that_there_is(tmp_path: Path, encoding: str, problem: str):
    content = "text,label\ncafé,x\n" + "".join(f"{i},y\n" for i in range(5))
    path = write(tmp_path / "a.csv", content.encode(encoding))
    for options, read in (("--data.tables", table), ("--data.corpus", texts)):
        with pytest.raises(UserError, match=f"a.csv:[12]: {problem} at column .*{options}.encoding .*utf-16") as caught:
            read(path)
        assert f"{options}.encoding_errors replace" in str(caught.value)
        assert len(read(path, encoding=encoding)) == 6
    assert table(path, encoding=encoding)[0][1]["text"] == texts(path, encoding=encoding)[0] == "café"
    with pytest.raises(UserError, match="--data.tables.encoding 'latin-99' is unknown"):
        table(path, encoding="latin-99")
    with pytest.raises(UserError, match="a.csv cannot be read .*UTF-16"):
        table(write(path, "text,label\na,x\n"), encoding="utf-16")


def test_bytes_of_a_table_are_replaced_and_counted(tmp_path: Path, capsys):
    path = write(tmp_path / "a.csv", b"text,label\ncaf\xe9 \xe8,x\nb,y\n")
    assert table(path, encoding_errors="replace")[0][1]["text"] == "caf\ufffd \ufffd"
    assert f"{path}: 2 invalid bytes were replaced" in capsys.readouterr().out
    path = write(tmp_path / "a.jsonl", '{"text": ["a", "b\\ud800"]}')  # no tokenizer takes half a pair
    with pytest.raises(UserError, match=r"a.jsonl:1: character U\+D800"):
        table(path)
    assert table(path, encoding_errors="replace") == [(1, {"text": ["a", "b\ufffd"]})]
    nul = write(tmp_path / "nul.csv", "text,label\na\0,x\n")
    with pytest.raises(UserError, match="nul.csv:2: a NUL byte at column 2.* --data.tables.encoding utf-16"):
        table(nul)


def test_json_lines_without_names_are_refused_with_an_example(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", json.dumps(["a", "x"]))
    with pytest.raises(UserError, match=r'a.jsonl:1: not a JSON object such as \{"text": "..."\}'):
        table(path)
    with pytest.raises(UserError, match=r'a.jsonl:1: not a JSON object such as \{"body": "..."\}'):
        texts(path, text_column="body")


def test_options_of_other_formats_are_refused(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}')
    for option, value in {"delimiter": ";", "quoting": True, "header": ["text"]}.items():
        with pytest.raises(UserError, match=f"--data.tables.{option} is only for the formats .csv, .tsv"):
            table(path, **{option: value})


def test_the_format_of_files_without_a_suffix_has_a_short_name(tmp_path: Path):
    path = write(tmp_path / "rows", "text\tlabel\na\tx\nb\ty\n")
    assert [row for _, row in table(path, format="tsv")] == ROWS
    assert texts(path, format="tsv") == ["a", "b"]
    with pytest.raises(
        UserError, match="rows does not have the suffix of a table: give its format with --data.tables.format csv"
    ):
        table(path)
    for read, option in ((table, "tables"), (texts, "corpus")):
        with pytest.raises(UserError, match=f"--data.{option}.format is 'tvs', but must be jsonl, csv, tsv, "):
            read(path, format="tvs")


OWN_FORMATS = """
from lm_lightning.data.formats import Format
from lm_lightning.data.reading import row_lines
from lm_lightning.errors import UserError


class LabelledLines(Format):
    def __init__(self, separator: str = ":") -> None:
        self.separator = separator

    def rows(self, path, options, report):
        for line in row_lines(path, options, report):
            label, separator, text = line.text.partition(self.separator)
            if not separator:
                raise UserError(f"{path}:{line.number}: there is no {self.separator} in the line: fix or remove it")
            yield line.number, {"label": label, "text": text}
"""


@pytest.fixture
def own_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module outside the package, as a user has it."""
    write(tmp_path / "my_formats.py", OWN_FORMATS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "my_formats.LabelledLines"
    sys.modules.pop("my_formats", None)


@pytest.mark.slow
def test_a_format_of_ones_own_is_a_class_path_of_a_corpus(
    own_formats: str, fit, cli, recipe: Path, tmp_path: Path, monkeypatch
):
    lines = [f"{i}{'=' if i % 2 else ':'}{text}" for i, text in enumerate(paragraphs(200))]
    odd = write(tmp_path / "odd.dat", "\n".join(lines[1::2]))
    flags = ("--data.corpus.paths", odd, "--data.corpus.format", own_formats)
    with pytest.raises(UserError, match=r"odd.dat:1: there is no : in the line"):
        cli("prepare", "--config", recipe, *flags)
    flags = (*flags, "--data.corpus.format.separator", "=", "--data.corpus.validation_fraction", 0.3)
    assert " documents, " in cli("fit", "--config", recipe, *flags)
    even = write(tmp_path / "even.dat", "\n".join(lines[::2]))
    given = json.dumps({"class_path": own_formats, "init_args": {"separator": ":"}})
    run = fit("--data.corpus.paths", even, "--data.corpus.format", given, "--data.corpus.validation_fraction", 0.3)
    documents = json.loads((run / "data.json").read_text())["splits"]
    assert sum(split["documents"] for split in documents.values()) == 100
    with pytest.raises(UserError, match="names my_formats.LabelledLines"):
        cli("validate", run)
    monkeypatch.setenv(PACKAGES, "my_formats")
    assert "val/loss" in cli("validate", run)


def test_a_format_of_ones_own_is_a_class_path_of_tables(own_formats: str, tmp_path: Path):
    kind = pydoc.locate(own_formats)
    path = write(tmp_path / "rows.dat", "x:a\ny:b\n")
    tables = Tables(str(path), format=kind())
    assert [dict(row) for row in read_files(str(path), tables)] == ROWS
    described = {"class_path": own_formats, "separator": ":"}
    assert json.loads(json.dumps(tables.described()))["format"] == described
    with pytest.raises(UserError, match="--data.tables.delimiter is only for the formats .csv, .tsv"):
        list(read_files(str(path), Tables(format=kind(), delimiter=";")))


def test_the_cache_of_a_corpus_depends_on_the_options_of_its_format(own_formats: str, tmp_path: Path):
    kind = pydoc.locate(own_formats)
    path = write(tmp_path / "rows.dat", "x:a\ny:b\n")
    found = [inputs(Corpus(str(path), format=own), tmp_path) for own in (None, kind(), kind(), kind("="), "jsonl")]
    assert "format" not in found[0], "caches without a format stay valid"
    assert found[1] == found[2] and all(json.dumps(other) != json.dumps(found[1]) for other in (found[0], *found[3:]))
