"""Formats: a file or a data set of the Hub in, its lines or rows out, one at a time."""

import codecs
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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Optional

from lm_lightning import errors
from lm_lightning.errors import UserError

PIECE = 65536  # characters; longer texts are cut
LONGEST_ROW = 1 << 27  # characters of a row, which is in memory as one
EXPANSION = 200  # times its size, to which a compressed file may expand ...
ALWAYS_ALLOWED = 1 << 28  # ... or to so many bytes
package = partial(errors.package, what="this corpus", extra="data")
_SURROGATE = re.compile("[\ud800-\udfff]")  # "surrogateescape" turns a bad byte into one

Rows = Iterator[tuple[int, Mapping[str, Any]]]  # with their line or row number


class Line(NamedTuple):
    """A line without its line break, or a part of a line over `PIECE` characters."""

    number: int
    text: str
    blank: bool  # the whole line is white space


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Args:
        options: Prefix of the options that decide this, such as `--data.corpus`, for messages.
        encoding: Encoding of the files, a name that Python knows.
        encoding_errors: Refuse bytes that the encoding does not allow (`strict`), or `replace` each by U+FFFD.
        delimiter: Character between the columns of CSV and TSV files. None: a comma or a tab, as the suffix says.
        quoting: Whether double quotes enclose cells of CSV and TSV files. None: in CSV files only.
        header: Names of the columns of files that have no line with them.
        columns: The only columns that are needed, of formats that can skip others. None: all.
        max_line: Longest line of plain text in characters; 0 allows any length.
    """

    options: str
    encoding: str = "utf-8"
    encoding_errors: Literal["strict", "replace"] = "strict"
    delimiter: Optional[str] = None
    quoting: Optional[bool] = None
    header: Optional[list[str]] = None
    columns: Optional[list[str]] = None
    max_line: int = 0

    def __post_init__(self) -> None:
        try:
            "".encode(self.encoding)
        except LookupError:
            raise UserError(
                f"{self.options}.encoding {self.encoding!r} is unknown; well-known ones are utf-8, utf-16, cp1252 and "
                "gb18030"
            ) from None
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n'):
            raise UserError(f"{self.options}.delimiter is {self.delimiter!r}, but must be one character, such as ';'")

    @property
    def codec(self) -> str:
        """The encoding, which for UTF-8 skips a byte order mark."""
        return "utf-8-sig" if codecs.lookup(self.encoding).name == "utf-8" else self.encoding


@dataclass
class Counts:
    """What was replaced or skipped while reading, to be reported at the end, and notes about single files."""

    replaced_bytes: int = 0
    empty_rows: int = 0
    notes: list[str] = field(default_factory=list)


def suffixes(path: Path) -> tuple[str, str]:
    """Return the suffixes for format and compression: (".jsonl", ".gz") for a.jsonl.gz, ("", "") for a file "a"."""
    *_, form, last = ["", ""] + [suffix.lower() for suffix in path.suffixes]
    return (form, last) if last in _OPENERS else (last, "")


def encodable(text: str, where: str, reading: Reading, counts: Counts, column: int = 0) -> str:
    """Return `text` without what UTF-8 cannot express: the bytes that were not UTF-8, and JSON's lone surrogates."""
    if not (bad := _SURROGATE.search(text)):
        return text
    if reading.encoding_errors == "strict":
        code, name = ord(bad[0]), codecs.lookup(reading.encoding).name.upper()
        what = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"character U+{code:04X}"
        raise UserError(
            f"{where}: {what} at column {column + bad.start() + 1} is not {name}; give the file's encoding, such as "
            f"{reading.options}.encoding cp1252 (or utf-16, gb18030), or replace what cannot be read with "
            f"{reading.options}.encoding_errors replace."
        )
    text, replaced = _SURROGATE.subn("\ufffd", text)
    counts.replaced_bytes += replaced
    return text


def _open_zst(path: Path) -> Any:
    # Unlike the zstandard package, pyarrow reports truncated files and reads those of several frames to their end.
    return package("pyarrow").input_stream(str(path), compression="zstd")


_OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".zst": _open_zst}


class _Expanding(io.RawIOBase):
    """The uncompressed bytes of a compressed file, which may be made to expand to any size."""

    def __init__(self, stream: Any, path: Path) -> None:
        self.stream, self.path, self.size = stream, path, 0
        self.limit = max(ALWAYS_ALLOWED, EXPANSION * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.stream.read(len(buffer))
        self.size += len(data)
        if self.size > self.limit:
            raise UserError(
                f"{self.path} expands to more than {EXPANSION} times its size, as no text does; if it is one after "
                "all, decompress it first"
            )
        buffer[: len(data)] = data
        return len(data)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file for its uncompressed bytes; what goes wrong until it is closed is a UserError."""
    compression = suffixes(path)[1]
    try:
        with _OPENERS.get(compression, partial(open, mode="rb"))(path) as stream:
            yield io.BufferedReader(_Expanding(stream, path), 1 << 17) if compression else stream
    except (OSError, EOFError, zlib.error, UnicodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); is it damaged or incomplete?") from None


def lines(path: Path, reading: Reading, counts: Counts, plain: bool = False) -> Iterator[Line]:
    """Yield the lines of a file; for `plain` text, long ones in parts or, over `max_line`, not at all."""
    with _opened(path) as stream:
        # newline="\n", as by default a lone carriage return, too, would end a line.
        text = io.TextIOWrapper(stream, encoding=reading.codec, errors="surrogateescape", newline="\n")
        size = PIECE if plain else LONGEST_ROW
        number, length = 1, 0
        while part := text.readline(size):
            while part[-1] == "\r" and (following := text.readline(1)):
                part += following  # a part must not end within a CRLF
            ended = part[-1] == "\n"
            if len(part) >= LONGEST_ROW and not ended:
                raise UserError(
                    f"{path}:{number}: a line of more than {LONGEST_ROW:,} characters, as no row is: split it"
                )
            if ended:
                part = part[: -2 if part.endswith("\r\n") else -1]
            if "\0" in part:
                if reading.encoding_errors == "strict":
                    raise UserError(
                        f"{path}:{number}: a NUL byte at column {length + part.index(chr(0)) + 1}, which no text has; "
                        f"if the file is UTF-16, give {reading.options}.encoding utf-16; replace such bytes with "
                        f"{reading.options}.encoding_errors replace."
                    )
                counts.replaced_bytes += part.count("\0")
                part = part.replace("\0", "\ufffd")
            if not part.isascii():
                part = encodable(part, f"{path}:{number}", reading, counts, column=length)
            blank = length == 0 and not part.strip() and (ended or len(part) < PIECE)
            length += len(part)
            if plain and 0 < reading.max_line < length:
                hint = "; its lines end with CR alone: convert these to LF" if "\r" in part.strip("\r") else ""
                while not ended and (part := text.readline(size)):
                    ended = part.endswith("\n")
                    length += len(part) - ended
                raise UserError(
                    f"{path}:{number}: the line has {length} characters, more than {reading.options}.max_line "
                    f"({reading.max_line}){hint or f'; if it is text after all, give {reading.options}.max_line 0'}."
                )
            yield Line(number, part, blank)
            if ended:
                number, length = number + 1, 0


def _row_lines(path: Path, reading: Reading, counts: Counts) -> Iterator[Line]:
    """Yield the lines of a file of rows, none of which has a carriage return (CR) within it."""
    for line in lines(path, reading, counts):
        if "\r" in line.text:
            raise _lone_cr(path, line)
        yield line


def _lone_cr(path: Path, line: Line) -> UserError:
    return UserError(
        f"{path}:{line.number}: a carriage return (CR) at column {line.text.index(chr(13)) + 1} that does not end the "
        "line; if it should, convert the file's line ends from CR to LF, or else remove it"
    )


def _jsonl_rows(path: Path, reading: Reading, counts: Counts) -> Rows:
    for line in _row_lines(path, reading, counts):
        if line.blank:
            continue
        try:
            row = json.loads(line.text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{line.number}: not valid JSON ({error}); fix or remove the line.") from None
        if not isinstance(row, dict):
            example = (reading.columns or ["text"])[0]
            raise UserError(f'{path}:{line.number}: not a JSON object such as {{"{example}": "..."}}.')
        yield line.number, row


DELIMITERS = ",;\t|"


def csv_rows(path: Path, reading: Reading, counts: Counts, delimiter: str = ",") -> Rows:
    """Yield the rows of a CSV or TSV file with the numbers of the lines on which they begin.

    Without `reading.header`, the first line that is not blank names the columns. Other blank lines, and empty cells
    beyond the last named column, are skipped.

    Args:
        path: The file.
        reading: How it is read.
        counts: Gets a note if the delimiter was detected, and how many rows span several lines.
        delimiter: The default one, of which it depends whether cells are quoted by default.
    """
    source = lines(path, reading, counts)
    first = next((line for line in source if not line.blank), None)
    if first is None:
        return
    quoting = delimiter == "," if reading.quoting is None else reading.quoting
    used = reading.delimiter or _detected(first.text, delimiter, reading.header)
    if used not in (delimiter, reading.delimiter):
        counts.notes.append(f"{path}: the columns are separated by {used!r} ({reading.options}.delimiter changes that)")
    if not quoting and "\r" in first.text:
        raise _lone_cr(path, first)  # else a file whose lines all end with CR were a header without rows
    csv.field_size_limit(LONGEST_ROW)
    texts = (line.text + "\n" for line in itertools.chain([first], source))
    reader = csv.reader(  # strict: else an open quote would swallow the rest
        texts, delimiter=used, quoting=csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE, strict=True
    )
    header, number = reading.header, first.number
    spanning, enclosed = [], []  # lines on which such rows begin
    try:
        for cells in reader:
            number, start = first.number + reader.line_num, number
            if number - start > 1:
                spanning.append(start)
            if header is None:
                header = _header(cells, f"{path}:{start}")
                continue
            extra = cells[len(header) :]
            if not cells or len(cells) == 1 < len(header) and not cells[0].strip():
                continue  # a blank line
            if len(cells) < len(header) or any(cell.strip() for cell in extra):
                raise UserError(
                    f"{path}:{start}: {len(cells)} cells (separated by {used!r}), but the header has {len(header)} "
                    f"columns; fix the row, or choose another {reading.options}.delimiter or .quoting"
                )
            if not quoting and any(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in cells):
                enclosed.append(start)
            yield start, dict(zip(header, cells))
    except csv.Error as error:
        if "new-line character" in str(error):
            raise UserError(
                f"{path}:{number}: a carriage return (CR) that does not end the line; if it should, convert the file's "
                "line ends from CR to LF, or else remove it or quote the cell"
            ) from None
        raise UserError(
            f"{path}:{number}: not valid CSV ({error}) in the row that begins here; fix it, or, if quotes do not "
            f"enclose cells, give {reading.options}.quoting false"
        ) from None
    if enclosed and reading.quoting is None:
        counts.notes.append(
            f"{path}: {len(enclosed):,} rows have a cell that begins and ends with a quote, the first on line "
            f"{enclosed[0]}; if quotes enclose cells, give {reading.options}.quoting true"
        )
    if spanning and reading.quoting is None:
        counts.notes.append(
            f"{path}: {len(spanning):,} rows have quotes that span lines, the first on line {spanning[0]}; if "
            f"quotes do not enclose cells, give {reading.options}.quoting false"
        )


def _detected(line: str, default: str, header: Optional[list[str]]) -> str:
    """Return the delimiter that the first line of a CSV file shows: the only one in it, if it has no comma."""
    others = [delimiter for delimiter in DELIMITERS if delimiter in re.sub(r'"[^"]*"', "", line)]
    if default != "," or len(others) != 1:
        return default
    if header is not None and len(next(csv.reader([line], delimiter=others[0]))) != len(header):
        return default
    return others[0]


def _header(cells: list[str], where: str) -> list[str]:
    """Return the names of the columns, without space around them and without empty ones at the end."""
    names = [cell.strip(" \t\ufeff") for cell in cells]
    while len(names) > 1 and not names[-1]:
        names.pop()
    if repeated := [name for name in names if name and names.count(name) > 1]:
        raise UserError(f"{where}: {names.count(repeated[0])} columns are called {repeated[0]!r}: rename all but one")
    return names


def hint(columns: Mapping[str, Any], options: str) -> str:
    """Return a remedy where the names of columns look like a header that was not split, else an empty text."""
    found = next((delimiter for delimiter in DELIMITERS if any(delimiter in str(name) for name in columns)), None)
    return f"; if {found!r} separates the columns, give {options}.delimiter {found!r}" if found else ""


CONLLU = ["id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc"]


def conll_rows(path: Path, reading: Reading, counts: Counts) -> Rows:
    """Yield the sentences of a file with a word a line and an empty line after each: lists of its columns' cells.

    The columns are separated by tabs, or else by spaces. Lines -DOCSTART- are no words.
    """
    yield from _sentences(
        path, reading, counts, lambda line: line.split("\t" if "\t" in line else None), reading.header
    )


def conllu_rows(path: Path, reading: Reading, counts: Counts) -> Rows:
    """Yield a CoNLL-U file's sentences: lists of its columns' cells, without ranges (2-3) and empty words (2.1)."""
    yield from _sentences(path, reading, counts, lambda line: line.split("\t"), CONLLU)


def _sentences(
    path: Path, reading: Reading, counts: Counts, cells: Callable[[str], list[str]], header: Optional[list[str]]
) -> Rows:
    conllu = header is CONLLU
    words: list[list[str]] = []
    start = 0
    for line in itertools.chain(_row_lines(path, reading, counts), [Line(0, "", True)]):
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
            raise UserError(f"{path}:{line.number}: the line has {len(word)} columns, but must have {width}: fix it")
        words.append(word)


def _parquet_rows(path: Path, reading: Reading, counts: Counts) -> Rows:
    pyarrow, parquet = package("pyarrow"), package("pyarrow.parquet")
    columns = set(reading.columns or [])
    with _opened(path) as stream, contextlib.ExitStack() as stack:
        if suffixes(path)[1]:  # Parquet needs random access, which a compressed file does not give
            plain = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(stream, plain)
            stream = plain
        try:
            file = parquet.ParquetFile(stream)
            expanded = sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
            if expanded > max(ALWAYS_ALLOWED, EXPANSION * path.stat().st_size):
                raise UserError(f"{path} expands to {expanded:,} bytes, more than {EXPANSION} times its size: split it")
            # If one is missing, read all columns: the message about the first row will list them.
            known = sorted(columns) if columns and columns <= set(file.schema_arrow.names) else None
            rows = (row for batch in file.iter_batches(256, columns=known) for row in batch.to_pylist())
            yield from enumerate(rows, start=1)
        except pyarrow.ArrowException as error:
            raise UserError(f"{path} is not a readable Parquet file ({error}).") from None


def squad_rows(path: Path, reading: Reading, counts: Counts) -> Rows:
    """Yield the questions of a file as of SQuAD, each with its context, numbered from 1."""
    text = "\n".join(line.text for line in lines(path, reading, counts))
    try:
        content = json.loads(text)
        rows = [
            {"title": article.get("title"), "context": paragraph["context"], **question}
            for article in content["data"]
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not valid JSON ({error}); fix the file, or, if each line is an object, name it .jsonl or give "
            f"{reading.options}.format jsonl."
        ) from None
    except (TypeError, KeyError, AttributeError):
        raise UserError(
            f"{path}: not in the form of SQuAD's files, with data, paragraphs and qas: convert it to JSONL, with an "
            "object on each line."
        ) from None
    yield from enumerate(rows, start=1)


ROWS: dict[str, Callable[[Path, Reading, Counts], Rows]] = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".csv": csv_rows,
    ".tsv": partial(csv_rows, delimiter="\t"),
    ".parquet": _parquet_rows,
}


def _named(label: Any, names: list[str]) -> Any:
    """Return the name of a label that is a number, or the names of a list of such; None if there is none (-1)."""
    if isinstance(label, list):
        return [_named(item, names) for item in label]
    return None if label is None or label < 0 else names[label]


def hub_rows(
    name: str, config: Optional[str], split: str, revision: Optional[str], streaming: bool, remedy: str
) -> Rows:
    """Yield the rows of a data set of the Hub, numbered from 1; labels with names have these, none (-1) is None.

    Args:
        name: Of the data set.
        config: Its configuration, if it has several.
        split: Its split.
        revision: Its branch, tag or commit. None: the newest.
        streaming: Whether to read it over the network instead of downloading it first.
        remedy: How a downloaded one is used without the network, for the message.
    """
    datasets, hub = package("datasets"), package("huggingface_hub")
    try:
        if streaming:  # without a network, fail at once instead of after half a minute of retries
            hub.get_session().head(hub.constants.ENDPOINT, timeout=10)
        dataset = datasets.load_dataset(name, config, split=split, revision=revision, streaming=streaming)
        features = getattr(dataset, "features", None) or {}  # not every stream knows them
        kinds = {column: getattr(kind, "feature", kind) for column, kind in features.items()}  # of a list, its items'
        names = {column: kind.names for column, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)}
        for number, row in enumerate(dataset, start=1):
            yield number, row | {column: _named(row[column], names[column]) for column in names}
    except Exception as error:  # the packages raise whatever their own dependencies do
        reason = " ".join(str(error).split())
        raise UserError(
            f"The data set {name!r} cannot be read from the Hugging Face Hub ({reason:.300}); check its name and "
            f"the network (a downloaded one needs none: {remedy})."
        ) from error
