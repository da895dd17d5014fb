"""Formats: read the rows of a file, one at a time.

`Format` is the base class. Your own subclass is chosen by its class path:

    --data.tables.format my_package.Ini
    --data.corpus.format my_package.Ini
"""

import contextlib
import csv
import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from lm_lightning.data import reading
from lm_lightning.data.reading import (
    Line,
    ReadOptions,
    ReadReport,
    lines,
    lone_cr,
    opened,
    package,
    row_lines,
    suffixes,
)
from lm_lightning.errors import UserError

Rows = Iterator[tuple[int, Mapping[str, Any]]]  # (number of the line or row, from 1; the row)
DELIMITERS = ",;\t|"


class Format:
    """Base class of formats, which read rows from files; a subclass defines `rows`.

    For example, files with `label: text` in each line:

        class LabelledLines(Format):
            def rows(self, path, options, report):
                for line in row_lines(path, options, report):
                    label, colon, text = line.text.partition(":")
                    if not colon:
                        raise UserError(f"{path}:{line.number}: there is no colon in the line: fix or remove it")
                    yield line.number, {"label": label, "text": text}

    Arguments of its `__init__` are options: `--data.tables.format '{class_path: my_package.Xml, init_args: {tag: p}}'`.

    Attributes:
        name: Short name for `--data.tables.format`, if the data module knows the format; see `find`.
        suffixes: Suffixes of such files in lower case, without `.gz` and `.zst`.
        options: Which of the options `header`, `delimiter` and `quoting` it supports; tables refuse the others.
        compact: Whether a file is smaller than its text, so that its size does not show how much text it contains.
    """

    name = ""
    suffixes: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    compact = False

    def rows(self, path: Path, options: ReadOptions, report: ReadReport) -> Rows:
        """Yield the rows of a file with their numbers: line numbers if each row has its own lines, else row numbers.

        Args:
            path: The file; `reading.row_lines` and `reading.opened` decompress it if necessary.
            options: Options for reading it.
            report: Collects counts and notes, which are printed at the end.

        Raises:
            UserError: If it cannot be read; names the file, the line and the remedy.
        """
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """Return the class and its attributes, JSON-serializable, as a part of the key for caching the rows."""
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", **vars(self)}


def find(path: Path, given: Format | str | None, known: Sequence[Format], prefix: str) -> Optional[Format]:
    """Return the format of a file; None if no format has its suffix.

    Args:
        path: The file.
        given: The format of all files or its short name. None: the suffix decides.
        known: Formats that have short names.
        prefix: Prefix of the options, such as `--data.tables`, for messages.
    """
    if isinstance(given, Format):
        return given
    if given is None:
        return next((known_format for known_format in known if suffixes(path)[0] in known_format.suffixes), None)
    for known_format in known:
        if given == known_format.name:
            return known_format
    raise UserError(
        f"{prefix}.format is {given!r:.200}, but must be {', '.join(known_format.name for known_format in known)}, or "
        "the class path of a subclass of lm_lightning.data.formats.Format with valid options"
    )


def identity(given: Format | str | None) -> Any:
    """Return the value of an option `format` as JSON-serializable data."""
    return given.identity() if isinstance(given, Format) else given


class Jsonl(Format):
    """A JSON object on each line."""

    name = "jsonl"
    suffixes = (".jsonl", ".ndjson")

    def rows(self, path: Path, options: ReadOptions, report: ReadReport) -> Rows:
        for line in row_lines(path, options, report):
            if line.blank:
                continue
            try:
                row = json.loads(line.text)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{line.number}: not valid JSON ({error}): fix or remove the line") from None
            if not isinstance(row, dict):
                example = (options.columns or ["text"])[0]
                raise UserError(
                    f'{path}:{line.number}: not a JSON object such as {{"{example}": "..."}}: fix or remove the line'
                )
            yield line.number, row


class Csv(Format):
    """Cells separated by commas or other delimiters; cells may be enclosed in quotes.

    Without the option `header`, the first line that is not blank contains the names of the columns. Other blank lines,
    and empty cells beyond the last named column, are skipped. The number of a row is the number of its first line.
    """

    name = "csv"
    suffixes = (".csv",)
    options = ("header", "delimiter", "quoting")
    delimiter = ","  # the default; by default, only cells separated by commas may be quoted

    def rows(self, path: Path, options: ReadOptions, report: ReadReport) -> Rows:
        source = lines(path, options, report)
        first = next((line for line in source if not line.blank), None)
        if first is None:
            return
        quoting = self.delimiter == "," if options.quoting is None else options.quoting
        delimiter = options.delimiter or self.detected(first.text, options.header)
        if delimiter not in (self.delimiter, options.delimiter):
            report.notes.append(
                f"{path}: the columns are separated by {delimiter!r} ({options.prefix}.delimiter changes that)"
            )
        if not quoting and "\r" in first.text:
            raise lone_cr(path, first)  # otherwise, a file whose lines all end with CR would be a header without rows
        header = options.header
        spanning, enclosed = [], []  # first lines of rows with such cells
        for start, end, cells in _cells(path, itertools.chain([first], source), delimiter, quoting, options):
            if end - start > 1:
                spanning.append(start)
            if header is None:
                header = _header(cells, f"{path}:{start}")
                continue
            extra = cells[len(header) :]
            if not cells or len(cells) == 1 < len(header) and not cells[0].strip():
                continue  # a blank line
            if len(cells) < len(header) or any(cell.strip() for cell in extra):
                raise UserError(
                    f"{path}:{start}: {len(cells)} cells (separated by {delimiter!r}), but the header has "
                    f"{len(header)} columns: fix the row, or choose another {options.prefix}.delimiter or "
                    f"{options.prefix}.quoting"
                )
            if not quoting and any(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in cells):
                enclosed.append(start)
            yield start, dict(zip(header, cells))
        if enclosed and options.quoting is None:
            report.notes.append(
                f"{path}: {len(enclosed):,} rows have a cell that begins and ends with a quote, the first on line "
                f"{enclosed[0]}; if these quotes are not text, give {options.prefix}.quoting true"
            )
        if spanning and options.quoting is None:
            report.notes.append(
                f"{path}: {len(spanning):,} rows have a quoted cell of several lines, the first on line "
                f"{spanning[0]}; if these quotes are text, give {options.prefix}.quoting false"
            )

    def detected(self, line: str, header: Optional[list[str]]) -> str:
        """Return the delimiter in the first line of a CSV file: the only one that it contains, or a comma."""
        others = [delimiter for delimiter in DELIMITERS if delimiter in re.sub(r'"[^"]*"', "", line)]
        if self.delimiter != "," or len(others) != 1:
            return self.delimiter
        if header is not None and len(next(csv.reader([line], delimiter=others[0]))) != len(header):
            return self.delimiter
        return others[0]


class Tsv(Csv):
    """Cells separated by tabs; quotes are text."""

    name = "tsv"
    suffixes = (".tsv",)
    delimiter = "\t"


def _cells(
    path: Path, source: Iterator[Line], delimiter: str, quoting: bool, options: ReadOptions
) -> Iterator[tuple[int, int, list[str]]]:
    """Yield the cells of each row, and the numbers of its first line and of the line after it."""
    csv.field_size_limit(reading.LONGEST_ROW)
    first = next(source)
    texts = (line.text + "\n" for line in itertools.chain([first], source))
    reader = csv.reader(  # strict, as otherwise the cell of an open quote would contain the rest of the file
        texts, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE, strict=True
    )
    number = first.number
    try:
        for cells in reader:
            start, number = number, first.number + reader.line_num
            yield start, number, cells
    except csv.Error as error:
        if "new-line character" in str(error):
            raise UserError(
                f"{path}:{number}: the line contains a carriage return (CR): convert the line ends of the file from CR "
                "to LF, or remove the CR or quote its cell"
            ) from None
        raise UserError(
            f"{path}:{number}: the row that begins here is not valid CSV ({error}): fix it or, if its quotes are text, "
            f"give {options.prefix}.quoting false"
        ) from None


def _header(cells: list[str], where: str) -> list[str]:
    """Return the names of the columns, without surrounding white space and without empty ones at the end."""
    names = [cell.strip(" \t\ufeff") for cell in cells]
    while len(names) > 1 and not names[-1]:
        names.pop()
    if repeated := [name for name in names if name and names.count(name) > 1]:
        raise UserError(f"{where}: {names.count(repeated[0])} columns are called {repeated[0]!r}: rename all but one")
    return names


def delimiter_hint(columns: Mapping[str, Any], prefix: str) -> str:
    """Return a remedy if the names of columns look like a header that was not split, otherwise an empty string."""
    found = next((delimiter for delimiter in DELIMITERS if any(delimiter in str(name) for name in columns)), None)
    return f"; if {found!r} separates the columns, give {prefix}.delimiter {found!r}" if found else ""


class Parquet(Format):
    """Rows of a Parquet file; only the required columns are read."""

    name = "parquet"
    suffixes = (".parquet",)
    compact = True

    def rows(self, path: Path, options: ReadOptions, report: ReadReport) -> Rows:
        pyarrow, parquet = package("pyarrow"), package("pyarrow.parquet")
        columns = set(options.columns or [])
        with opened(path, report) as stream, contextlib.ExitStack() as stack:
            if suffixes(path)[1]:  # Parquet needs random access, which a compressed file does not support
                plain = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(stream, plain)
                stream = plain
            try:
                file = parquet.ParquetFile(stream)
                expanded = sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
                if expanded > max(reading.ALWAYS_ALLOWED, reading.EXPANSION * path.stat().st_size):
                    raise UserError(
                        f"{path} expands to {expanded:,} bytes, more than {reading.EXPANSION} times its size: split it"
                    )
                # If one is missing, read all columns: the message about the first row will list them.
                known = sorted(columns) if columns and columns <= set(file.schema_arrow.names) else None
                rows = (row for batch in file.iter_batches(256, columns=known) for row in batch.to_pylist())
                yield from enumerate(rows, start=1)
            except pyarrow.ArrowException as error:
                raise UserError(f"{path} is not a readable Parquet file ({error})") from None


FORMATS: tuple[Format, ...] = (Jsonl(), Csv(), Tsv(), Parquet())
