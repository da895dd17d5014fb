"""Formats: a file or a data set of the Hub in, its lines or rows out, one at a time."""

import contextlib
import csv
import gzip
import io
import itertools
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Optional

from lm_lightning import errors
from lm_lightning.errors import UserError

if TYPE_CHECKING:
    from lm_lightning.data.corpus import Corpus

PIECE = 65536  # characters; longer texts are cut
package = partial(errors.package, what="this corpus", extra="data")
_SURROGATE = re.compile("[\ud800-\udfff]")  # "surrogateescape" turns a bad byte into one

Rows = Iterator[tuple[int, Mapping[str, Any]]]  # with their line or row number


class Line(NamedTuple):
    """A line without its line break, or a part of a line over `PIECE` characters."""

    number: int
    text: str
    blank: bool  # the whole line is white space


@dataclass
class Counts:
    """What was replaced or left out while reading, to be told at the end."""

    replaced_bytes: int = 0
    empty_rows: int = 0


def suffixes(path: Path) -> tuple[str, str]:
    """Return the suffixes for format and compression: (".jsonl", ".gz") for a.jsonl.gz, ("", "") for a file "a"."""
    *_, form, last = ["", ""] + [suffix.lower() for suffix in path.suffixes]
    return (form, last) if last in _OPENERS else (last, "")


def encodable(text: str, where: str, corpus: "Corpus", counts: Counts, column: int = 0) -> str:
    """Return `text` without what UTF-8 cannot express: the bytes that were not UTF-8, and JSON's lone surrogates."""
    if not (bad := _SURROGATE.search(text)):
        return text
    if corpus.encoding_errors == "strict":
        code = ord(bad[0])
        what = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"character U+{code:04X}"
        raise UserError(
            f"{where}: {what} at column {column + bad.start() + 1} is not UTF-8; convert the file, or replace such "
            "bytes with --data.corpus.encoding_errors replace."
        )
    text, replaced = _SURROGATE.subn("\ufffd", text)
    counts.replaced_bytes += replaced
    return text


def _open_zst(path: Path) -> Any:
    # Unlike the zstandard package, pyarrow reports truncated files and reads those of several frames to their end.
    return package("pyarrow").input_stream(str(path), compression="zstd")


_OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".zst": _open_zst}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file for its uncompressed bytes; what goes wrong until it is closed is a UserError."""
    try:
        with _OPENERS.get(suffixes(path)[1], partial(open, mode="rb"))(path) as stream:
            yield stream
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}); is it damaged or incomplete?") from None


def lines(path: Path, corpus: "Corpus", counts: Counts, plain: bool = False) -> Iterator[Line]:
    """Yield the lines of a file; for `plain` text, long ones in parts or, over `max_line`, not at all."""
    with _opened(path) as stream:
        # newline="\n", as by default a lone carriage return, too, would end a line.
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="\n")
        size = PIECE if plain else -1
        number, length = 1, 0
        while part := text.readline(size):
            while part[-1] == "\r" and (following := text.readline(1)):
                part += following  # a part must not end within a CRLF
            ended = part[-1] == "\n"
            if ended:
                part = part[: -2 if part.endswith("\r\n") else -1]
            if "\0" in part:
                if corpus.encoding_errors == "strict":
                    raise UserError(
                        f"{path}:{number}: a NUL byte at column {length + part.index(chr(0)) + 1}, which text has "
                        "not: is it UTF-16, or no text? Convert the file, or replace such bytes with "
                        "--data.corpus.encoding_errors replace."
                    )
                counts.replaced_bytes += part.count("\0")
                part = part.replace("\0", "\ufffd")
            if not part.isascii():
                part = encodable(part, f"{path}:{number}", corpus, counts, column=length)
            blank = length == 0 and not part.strip() and (ended or len(part) < PIECE)
            length += len(part)
            if plain and 0 < corpus.max_line < length:
                while not ended and (part := text.readline(size)):
                    ended = part.endswith("\n")
                    length += len(part) - ended
                raise UserError(
                    f"{path}:{number}: the line has {length} characters, more than --data.corpus.max_line "
                    f"({corpus.max_line}); if it is text after all, give --data.corpus.max_line 0."
                )
            yield Line(number, part, blank)
            if ended:
                number, length = number + 1, 0


def _jsonl_rows(path: Path, corpus: "Corpus", counts: Counts) -> Rows:
    for line in lines(path, corpus, counts):
        if line.blank:
            continue
        try:
            row = json.loads(line.text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{line.number}: not valid JSON ({error}); mend or remove the line.") from None
        if not isinstance(row, dict):
            raise UserError(f'{path}:{line.number}: not a JSON object such as {{"{corpus.text_column}": "..."}}.')
        yield line.number, row


def csv_rows(
    path: Path, corpus: "Corpus", counts: Counts, delimiter: str = ",", header: Optional[list[str]] = None
) -> Rows:
    """Yield the rows of a CSV or TSV file; without a `header`, its first line is that."""
    csv.field_size_limit(2**31 - 1)  # the largest that every platform accepts
    texts = (line.text + "\n" for line in lines(path, corpus, counts))
    reader = csv.DictReader(
        texts, header, delimiter=delimiter, strict=True
    )  # strict: an open quote would swallow the rest
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not valid CSV ({error}); mend it or convert it to JSONL.") from None


CONLLU = ["id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc"]


def conll_rows(path: Path, corpus: "Corpus", counts: Counts, header: Optional[list[str]] = None) -> Rows:
    """Yield the sentences of a file with a word a line and an empty line after each: lists of its columns' cells.

    The columns are separated by tabs, or else by spaces. Lines -DOCSTART- are no words.
    """
    yield from _sentences(path, corpus, counts, lambda line: line.split("\t" if "\t" in line else None), header)


def conllu_rows(path: Path, corpus: "Corpus", counts: Counts) -> Rows:
    """Yield a CoNLL-U file's sentences: lists of its columns' cells, without ranges (2-3) and empty words (2.1)."""
    yield from _sentences(path, corpus, counts, lambda line: line.split("\t"), CONLLU)


def _sentences(
    path: Path, corpus: "Corpus", counts: Counts, cells: Callable[[str], list[str]], header: Optional[list[str]]
) -> Rows:
    conllu = header is CONLLU
    words: list[list[str]] = []
    start = 0
    for line in itertools.chain(lines(path, corpus, counts), [Line(0, "", True)]):
        if line.blank:
            if words:
                columns = [list(column) for column in zip(*words)]
                yield start, dict(zip(header or map(str, range(len(columns))), columns))
            words = []
            continue
        if line.text.startswith("#") and conllu or line.text.startswith("-DOCSTART-"):
            continue
        word = cells(line.text.strip())
        if conllu and not word[0].isdigit() and len(word) == len(CONLLU):
            continue
        if not words:
            start = line.number
        width = len(words[0]) if words else len(header or word)
        if len(word) != width:
            raise UserError(f"{path}:{line.number}: the line has {len(word)} columns, but must have {width}: mend it")
        words.append(word)


def _parquet_rows(path: Path, corpus: "Corpus", counts: Counts) -> Rows:
    pyarrow, parquet = package("pyarrow"), package("pyarrow.parquet")
    columns = {column for column in (corpus.text_column, corpus.name_column) if column}
    with _opened(path) as stream, contextlib.ExitStack() as stack:
        if suffixes(path)[1]:  # Parquet needs random access, which a compressed file does not give
            plain = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(stream, plain)
            stream = plain
        try:
            file = parquet.ParquetFile(stream)
            # If one is missing, read all columns: the message about the first row will list them.
            known = sorted(columns) if columns and columns <= set(file.schema_arrow.names) else None
            rows = (row for batch in file.iter_batches(256, columns=known) for row in batch.to_pylist())
            yield from enumerate(rows, start=1)
        except pyarrow.ArrowException as error:
            raise UserError(f"{path} is not a readable Parquet file ({error}).") from None


def squad_rows(path: Path, corpus: "Corpus", counts: Counts) -> Rows:
    """Yield the questions of a file as of SQuAD, each with its context, numbered from 1."""
    with _opened(path) as stream:
        try:
            content = json.loads(stream.read().decode("utf-8-sig"))
            rows = [
                {"title": article.get("title"), "context": paragraph["context"], **question}
                for article in content["data"]
                for paragraph in article["paragraphs"]
                for question in paragraph["qas"]
            ]
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}: not valid JSON ({error}); mend the file, or call it .jsonl if it is that."
            ) from None
        except (TypeError, KeyError, AttributeError):
            raise UserError(
                f"{path}: not as SQuAD's files, with data, paragraphs and qas: convert it to JSONL, a row a line."
            ) from None
    yield from enumerate(rows, start=1)


ROWS: dict[str, Callable[[Path, "Corpus", Counts], Rows]] = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".csv": csv_rows,
    ".tsv": partial(csv_rows, delimiter="\t"),
    ".parquet": _parquet_rows,
}


def hub_rows(corpus: "Corpus") -> Rows:
    """Yield the rows of a data set of the Hub, numbered from 1; labels with names have these, none (-1) is None."""
    datasets, hub = package("datasets"), package("huggingface_hub")
    try:
        if corpus.streaming:  # without a network, fail at once instead of after half a minute of retries
            hub.get_session().head(hub.constants.ENDPOINT, timeout=10)
        dataset = datasets.load_dataset(
            corpus.hub,
            corpus.hub_config,
            split=corpus.hub_split,
            revision=corpus.hub_revision,
            streaming=corpus.streaming,
        )
        features = getattr(dataset, "features", None) or {}  # not every stream knows them
        names = {column: label.names for column, label in features.items() if isinstance(label, datasets.ClassLabel)}
        for number, row in enumerate(dataset, start=1):
            given = {column: row[column] for column in names if row[column] is not None and row[column] >= 0}
            yield number, row | dict.fromkeys(names) | {column: names[column][label] for column, label in given.items()}
    except Exception as error:  # the packages raise whatever their own dependencies do
        reason = " ".join(str(error).split())
        raise UserError(
            f"The data set {corpus.hub!r} cannot be read from the Hugging Face Hub ({reason:.300}); check its name and "
            "the network (a downloaded one needs none: HF_HUB_OFFLINE=1 and --data.corpus.streaming false)."
        ) from error
