"""Corpora: the origin of the documents, how they are read, and to which split each belongs.

All reading is streamed. A document is read as one or more consecutive `Piece`s, so that neither a huge corpus nor a
huge document has to fit into memory (a row of a JSON, CSV or Parquet file does).
"""

import difflib
import glob
import hashlib
import itertools
import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional

from lm_lightning.console import printable
from lm_lightning.data import builtin, cache, formats
from lm_lightning.data.filter import Filter
from lm_lightning.data.formats import Format, Rows
from lm_lightning.data.hub_rows import hub_rows
from lm_lightning.data.reading import PIECE, Line, ReadOptions, ReadReport, encodable, lines, suffixes
from lm_lightning.errors import UserError

# Where a text may be cut, best first. No pre-tokenization joins a letter or digit to the space after it. A text without
# such spaces is cut at a line break or after CJK punctuation, otherwise at the limit, which may change its tokens.
_CUTS = (
    re.compile(r"(?<=[^\W_]) (?=[^\W\d_])"),
    re.compile(r"(?<=\n)(?=\S)"),
    re.compile(r"(?<=[。！？；，、])"),
)


# These do not affect the documents, or are added separately.
_NO_INPUTS = ("streaming", "format", "filters", "filter_processes", "prefix")


@dataclass
class Corpus:
    """The documents to train on, and how they are split into training, validation and test documents.

    The suffix of a file determines its format, unless `format` does: .jsonl and .ndjson, .csv, .tsv, .parquet; all
    others are plain text. Each may be compressed as .gz or .zst. Documents are assigned to splits by a hash of their
    name (of whole files, rows with a name, and the built-in corpus), otherwise of their text, so that documents with
    the same text are in the same split.

    Args:
        paths: Files, folders (read recursively, without hidden files) and patterns such as `books/**/*.txt`. If neither
            `paths` nor `hub` is given, the built-in corpus is used: the documentation that is part of Python.
        validation_paths: Files, folders and patterns for the validation split only. If given, no document of `paths`
            or `hub` is assigned to that split.
        test_paths: The same for the test split.
        document: What a document of a plain text file is: the file, a paragraph (paragraphs are separated by blank
            lines) or a line.
        format: Format of all files, if their suffixes do not show it: `jsonl`, `csv`, `tsv`, `parquet`, or the class
            path of your own subclass of `lm_lightning.data.formats.Format`, which reads rows with the columns below.
        text_column: The column with the text, in all formats except plain text.
        name_column: The column with the name of the document. All rows with the same name are in the same split.
        hub: Name of a data set on the Hugging Face Hub.
        hub_config: Configuration of that data set.
        hub_split: Split of that data set to read; its documents are then split like all others.
        hub_revision: Branch, tag or commit of that data set; a commit makes the corpus reproducible.
        streaming: Whether to read that data set over the network instead of downloading it first.
        validation_fraction: Fraction of the documents for the validation split.
        test_fraction: Fraction of the documents for the test split.
        max_line: Maximum length of a line of plain text in characters, since longer ones are usually not prose. 0
            allows any length.
        encoding: Encoding of the files, such as `utf-8`, `utf-16`, `cp1252` or `gb18030`.
        encoding_errors: What to do with bytes that are invalid in the encoding: `strict` stops, `replace` replaces each
            by U+FFFD and reports their number.
        delimiter: Character between the columns of CSV and TSV files. Default: a tab in TSV files; in CSV files, a
            comma or, if the first line has no comma, the semicolon, tab or bar in it.
        quoting: Whether cells of CSV and TSV files may be enclosed in double quotes. Default: only those of CSV files.
        filters: Filters that remove, mark or change documents, applied in this order.
        filter_processes: Number of processes that filter. Default: the number of CPU cores. It does not affect the
            result.
    """

    paths: list[str] | str = field(default_factory=list)
    validation_paths: list[str] | str = field(default_factory=list)
    test_paths: list[str] | str = field(default_factory=list)
    document: Literal["file", "paragraph", "line"] = "paragraph"
    format: Format | str | None = None
    text_column: str = "text"
    name_column: str | None = None
    hub: str | None = None
    hub_config: str | None = None
    hub_split: str = "train"
    hub_revision: str | None = None
    streaming: bool = True
    validation_fraction: float = 0.05
    test_fraction: float = 0.05
    max_line: int = 65536
    encoding: str = "utf-8"
    encoding_errors: Literal["strict", "replace"] = "strict"
    delimiter: Optional[str] = None
    quoting: Optional[bool] = None
    filters: list[Filter] = field(default_factory=list)
    filter_processes: Optional[int] = None

    prefix = "--data.corpus"  # of the options, for messages (without a type, so that it is no option itself)

    def __post_init__(self) -> None:
        for option in ("paths", "validation_paths", "test_paths"):
            value = getattr(self, option)
            setattr(self, option, [value] if isinstance(value, str) else value)


def read_options(corpus: Corpus) -> ReadOptions:
    """Return the options for reading the files of a corpus."""
    return ReadOptions(
        corpus.prefix,
        corpus.encoding,
        corpus.encoding_errors,
        corpus.delimiter,
        corpus.quoting,
        columns=[column for column in (corpus.text_column, corpus.name_column) if column],
        max_line=corpus.max_line,
    )


class Piece(NamedTuple):
    """A part of a document, at most 65,536 characters long. Joining a document's pieces gives its text.

    Attributes:
        split: "train", "validation" or "test"; the same for all pieces of a document.
        name: The document's name, for messages. Not unique.
        text: The text. If possible, documents are cut before a space between two words, so that tokenizing the pieces
            individually gives the document's tokens.
        last: Whether this is the last piece of the document.
    """

    split: str
    name: str
    text: str
    last: bool


class _File(NamedTuple):
    path: Path
    name: str  # relative to the path that the user gave, so that moving a folder does not change the splits
    split: str | None  # None: the hash decides


class _Document(NamedTuple):
    split: str | None  # None: the hash decides
    name: str
    named: bool  # whether the hash is of the name, not of the text
    parts: Iterable[str]


def read(corpus: Corpus, cache_dir: Path) -> Iterator[Piece]:
    """Yield the pieces of all documents, in the same order on every call.

    At the end the numbers of replaced bytes and of skipped rows, if there are any, are printed to stderr.

    Raises:
        UserError: The corpus has no documents, or a part of it is missing, damaged or not in the expected format.
    """
    _check(corpus)
    report = ReadReport()
    empty = True
    for document in _documents(corpus, cache_dir, report):
        split = document.split
        for text, last in cut(document.parts):
            # The hash uses only the first piece, as the rest of a huge document has not been read yet.
            split = split or _hash_split(corpus, document.name if document.named else text)
            empty = False
            yield Piece(split, document.name, text, last)
    if empty:
        raise UserError(f"the corpus contains no text: check {corpus.prefix}.paths")
    for note in report.notes:
        print(printable(note), file=sys.stderr)
    if report.replaced_bytes:
        print(f"corpus: {report.replaced_bytes} invalid bytes were replaced by U+FFFD", file=sys.stderr)
    if report.empty_rows:
        print(f"corpus: {report.empty_rows} rows without text were skipped", file=sys.stderr)


def inputs(corpus: Corpus, cache_dir: Path) -> dict[str, Any]:
    """Return everything that determines what `read` yields, JSON-serializable, as a key for caching results.

    It contains the names and contents of files, and the names and given revisions of data sets of the Hub.
    """
    _check(corpus)
    result = {name: value for name, value in vars(corpus).items() if name not in _NO_INPUTS}
    if corpus.filters:
        result["filters"] = [own.identity() for own in corpus.filters]
    if corpus.format is not None:
        result["format"] = formats.identity(corpus.format)
    for option in ("paths", "validation_paths", "test_paths"):
        result[option] = bool(result[option])  # the paths do not matter, only whether the split has its own files
    result["files"] = [[file.split, file.name, cache.content(file.path, cache_dir)] for file in _files(corpus)]
    if _is_builtin(corpus):
        result["builtin"] = [platform.python_version(), builtin.fingerprint(builtin.documents(cache_dir))]
    return result


def total_bytes(corpus: Corpus, cache_dir: Path) -> int | None:
    """Return the approximate number of UTF-8 bytes that `read` yields, including markup of JSON; None if unknown."""
    files = _files(corpus)
    if corpus.hub or any(suffixes(file.path)[1] or getattr(_format(corpus, file), "compact", False) for file in files):
        return None
    texts = [text for _, text in builtin.documents(cache_dir)] if _is_builtin(corpus) else []
    return sum(file.path.stat().st_size for file in files) + sum(len(text.encode()) for text in texts)


def _check(corpus: Corpus) -> None:
    validation, test = corpus.validation_fraction, corpus.test_fraction
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise UserError(
            f"{corpus.prefix}.validation_fraction ({validation}) and {corpus.prefix}.test_fraction ({test}) "
            "must not be negative, and their sum must be less than 1"
        )
    if corpus.filter_processes is not None and corpus.filter_processes < 1:
        raise UserError(f"{corpus.prefix}.filter_processes is {corpus.filter_processes}, but must be 1 or more")
    for own in corpus.filters:
        own.check()


def _is_builtin(corpus: Corpus) -> bool:
    return not corpus.paths and not corpus.hub


def _hash_split(corpus: Corpus, key: str) -> str:
    validation = 0 if corpus.validation_paths else corpus.validation_fraction
    test = 0 if corpus.test_paths else corpus.test_fraction
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    position = int.from_bytes(digest, "big") / 2**64
    return "validation" if position < validation else "test" if position < validation + test else "train"


def cut(parts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Yield the joined `parts` as pieces of at most `PIECE` characters, and whether a piece is the last.

    The cuts depend only on the text, not on how it is divided into `parts`.
    """
    pending: list[str] = []
    size = 0
    for part in parts:
        pending.append(part)
        size += len(part)
        if size <= PIECE:
            continue
        text, start = "".join(pending), 0
        while len(text) - start > PIECE:
            end = start + PIECE
            matches = (pattern.search(text, end - PIECE // 2, end) for pattern in _CUTS)
            cut = next((match.start() for match in matches if match), end)
            yield text[start:cut], False
            start = cut
        pending, size = [text[start:]], len(text) - start
    if size:
        yield "".join(pending), True


# Selection of files


def _files(corpus: Corpus) -> list[_File]:
    """Return the files in the order of reading, without duplicates."""
    found: dict[str, _File] = {}
    options = (("validation", corpus.validation_paths), ("test", corpus.test_paths), (None, corpus.paths))
    for split, patterns in options:
        for name, path in itertools.chain.from_iterable(map(expand, patterns)):
            first = found.setdefault(os.path.realpath(path), _File(path, name, split))
            if split and first.split != split:
                raise UserError(f"{path} is in both {corpus.prefix}.validation_paths and {corpus.prefix}.test_paths")
    return list(found.values())


def expand(pattern: str) -> list[tuple[str, Path]]:
    """Return the files of a path or pattern, each with its name relative to it, sorted by name."""
    given = os.path.expanduser(pattern)
    if os.path.isfile(given):
        return [(os.path.basename(given), Path(given))]
    if os.path.isdir(given):
        root, pattern_below = Path(given), "**/*"
    else:
        steps = Path(given).parts
        fixed = list(itertools.takewhile(lambda step: not re.search(r"[*?[]", step), steps))
        if len(fixed) == len(steps):
            near = [other.name for other in Path(given).parent.iterdir()] if Path(given).parent.is_dir() else []
            close = difflib.get_close_matches(Path(given).name, near, n=1)
            raise UserError(
                f"{pattern} does not exist" + (f": did you mean {Path(given).parent / close[0]}?" if close else "")
            )
        root, pattern_below = Path(*fixed), os.path.join(*steps[len(fixed) :])
    names = sorted(set(glob.glob(pattern_below, root_dir=root, recursive=True)))
    files = [(Path(name).as_posix(), root / name) for name in names if os.path.isfile(root / name)]
    if not files:
        raise UserError(f"{pattern} contains no files (hidden files are not read)")
    return files


# From files to documents


def _documents(corpus: Corpus, cache_dir: Path, report: ReadReport) -> Iterator[_Document]:
    options = read_options(corpus)
    for file in _files(corpus):
        if file_format := _format(corpus, file):
            rows = file_format.rows(file.path, options, report)
            yield from _of_rows(rows, file, corpus, options, report)
        else:
            yield from _of_text(file, corpus.document, options, report)
    if corpus.hub:
        remedy = f"HF_HUB_OFFLINE=1 and {corpus.prefix}.streaming false"
        rows = hub_rows(corpus.hub, corpus.hub_config, corpus.hub_split, corpus.hub_revision, corpus.streaming, remedy)
        yield from _of_rows(rows, _File(Path(corpus.hub), corpus.hub, None), corpus, options, report)
    if _is_builtin(corpus):
        for name, text in builtin.documents(cache_dir):
            yield _Document(None, name, True, [text])


def _format(corpus: Corpus, file: _File) -> Optional[Format]:
    """Return the format of a file with rows, None if it is plain text."""
    return formats.find(file.path, corpus.format, formats.FORMATS, corpus.prefix)


def _of_text(file: _File, document: str, options: ReadOptions, report: ReadReport) -> Iterator[_Document]:
    """Yield a text file's documents: its lines without the last line break, and without blank lines at the start."""
    keys = {"file": lambda line: None, "paragraph": lambda line: line.blank, "line": lambda line: line.number}
    started = itertools.dropwhile(lambda line: line.blank, lines(file.path, options, report, plain=True))
    for _, group in itertools.groupby(started, keys[document]):
        first = next(group)
        if not first.blank:
            named = document == "file"
            name = file.name if named else f"{file.name}:{first.number}"
            group = itertools.chain([first], group)
            yield _Document(file.split, name, named, _joined(group))


def _joined(group: Iterable[Line]) -> Iterator[str]:
    number = None
    for line in group:
        yield line.text if number in (None, line.number) else "\n" + line.text
        number = line.number


def _of_rows(rows: Rows, file: _File, corpus: Corpus, options: ReadOptions, report: ReadReport) -> Iterator[_Document]:
    for number, row in rows:
        where = f"{file.path}:{number}"
        text = encodable(_string(row, corpus, "text_column", where), where, options, report)
        name = ""
        if corpus.name_column is not None:
            name = _string(row, corpus, "name_column", where)
        if text.strip():
            yield _Document(file.split, name or f"{file.name}:{number}", bool(name), [text])
        else:
            report.empty_rows += 1


def _string(row: Mapping[str, Any], corpus: Corpus, option: str, where: str) -> str:
    column = getattr(corpus, option)
    value = row.get(column)
    if not isinstance(value, str):
        hint = formats.delimiter_hint(row, corpus.prefix)
        raise UserError(
            f"{where}: column {column!r} of the row is {value!r:.40}, not a string; the columns are "
            f"{', '.join(map(str, row))}: choose one with {corpus.prefix}.{option}{hint}"
        )
    return value
