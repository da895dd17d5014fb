"""Tables: rows with named columns, from files in any of several formats or from the Hugging Face Hub."""

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

from lightning.pytorch.utilities import rank_zero_only

from lm_lightning.data import formats
from lm_lightning.data.corpus import expand
from lm_lightning.data.formats import Format, delimiter_hint
from lm_lightning.data.hub_rows import hub_rows
from lm_lightning.data.reading import ReadOptions, ReadReport, encodable
from lm_lightning.errors import UserError
from lm_lightning.finetuning import cells
from lm_lightning.finetuning.conll import Conll, Conllu

PREFIX = "--data.tables"  # prefix of the options, for messages
FORMATS: tuple[Format, ...] = (*formats.FORMATS, Conll(), Conllu())  # formats of all tables; a task may add others


@dataclass
class Tables:
    """The files with the rows of each split.

    Args:
        train: Files, folders or patterns of the training split. Formats: JSONL, CSV, TSV, Parquet; for labelled words
            also CoNLL (a word with its labels on each line) and CoNLL-U; for questions also JSON in the format of
            SQuAD. Each may be compressed as .gz or .zst.
        validation: The same for the validation split. Default: rows of `train` are held out by a hash of their text, so
            that the same text is never in both splits.
        test: The same for the test split.
        predict: The same for the rows for which `predict` computes predictions; they need no labels. Default: those of
            `test`.
        validation_fraction: Fraction of the rows of `train` to hold out for validation, if `validation` is not given.
        format: Format of all files, if their suffixes do not show it: `jsonl`, `csv`, `tsv`, `parquet`, `conll`,
            `conllu` or, for questions, `squad`; or the class path of your own subclass of
            `lm_lightning.data.formats.Format`.
        header: Names of the columns, for CSV and TSV files without a header line, and for CoNLL files (default: `0`,
            `1`, ...).
        delimiter: Character between the columns of CSV and TSV files. Default: a tab in TSV files; in CSV files, a
            comma or, if the first line has no comma, the semicolon, tab or bar in it.
        quoting: Whether cells of CSV and TSV files may be enclosed in double quotes. Default: only those of CSV files.
        encoding: Encoding of the files, such as `utf-8`, `utf-16`, `cp1252` or `gb18030`.
        encoding_errors: What to do with bytes that are invalid in the encoding: `strict` stops, `replace` replaces each
            by U+FFFD and reports their number.
        hub: Name of a data set on the Hugging Face Hub; `train`, `validation`, `test` and `predict` then are names of
            its splits, not files.
        hub_config: Configuration of that data set.
        hub_revision: Branch, tag or commit of that data set.
    """

    train: list[str] | str = field(default_factory=list)
    validation: list[str] | str = field(default_factory=list)
    test: list[str] | str = field(default_factory=list)
    predict: list[str] | str = field(default_factory=list)
    validation_fraction: float = 0.1
    format: Format | str | None = None
    header: Optional[list[str]] = None
    delimiter: Optional[str] = None
    quoting: Optional[bool] = None
    encoding: str = "utf-8"
    encoding_errors: Literal["strict", "replace"] = "strict"
    hub: Optional[str] = None
    hub_config: Optional[str] = None
    hub_revision: Optional[str] = None

    def __post_init__(self) -> None:
        for split in ("train", "validation", "test", "predict"):
            value = getattr(self, split)
            setattr(self, split, [value] if isinstance(value, str) else value)

    def described(self) -> dict[str, Any]:
        """The options as JSON-serializable data."""
        return asdict(self) | {"format": formats.identity(self.format)}


class Row(Mapping):
    """A row of a table, with its origin.

    Args:
        values: Values by the names of the columns.
        where: File and line number, for messages.
        header: Whether the option `header` can set the names of its columns, for messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str, header: bool = False) -> None:
        self.values_by_column, self.where, self.header = values, where, header

    def __getitem__(self, column: str) -> Any:
        return self.values_by_column[column]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_column)

    def __len__(self) -> int:
        return len(self.values_by_column)

    def value(self, column: str) -> Any:
        """The value of a column.

        Raises:
            UserError: If there is no such column.
        """
        if column not in self:
            raise UserError(
                f"{self.where}: there is no column {column!r}; the columns are {', '.join(map(str, self))}: set the "
                f"option of --data.columns that has the value {column!r} to one of them"
                + (", or name the columns of a file without a header by --data.tables.header" if self.header else "")
                + (delimiter_hint(self, PREFIX) if self.header else "")
            )
        return self[column]

    def words(self, column: str) -> list[str]:
        """The words in a column, at least one.

        The value may be a list, a string with a list in JSON or Python syntax, or a string with spaces between words.

        Raises:
            UserError: If it is none of these.
        """
        value = self.value(column)
        words = self.entries(column)
        if isinstance(value, str) and not all(isinstance(word, str) for word in words or [None]):
            words = value.split()
        if not words or not all(isinstance(w, str) and w.strip() for w in words):
            raise UserError(
                f"{self.where}: column {column!r} is {value!r:.40}, but must be a list of words: fix or remove the row"
            )
        return words

    def entries(self, column: str, strict: bool = False) -> Optional[list]:
        """The list in a column, which may be a string in JSON or Python syntax; None if the column has no list.

        Raises:
            UserError: If a string looks like a list, but cannot be parsed, see `cells.as_list`.
        """
        value = self.value(column)
        try:
            return cells.as_list(value, strict)
        except ValueError as error:
            raise UserError(
                f"{self.where}: column {column!r} is {value!r:.40}, which looks like a list, but cannot be parsed "
                f'({error}): write it as JSON, such as ["a", "b"]'
            ) from None

    def number(self, column: str) -> float:
        """The number in a column, which must be finite as float32.

        Raises:
            UserError: If it is not a finite number.
        """
        value = self.value(column)
        try:
            return cells.number(value)
        except ValueError as error:
            reason = f" ({error})" if str(error) else ""
            raise UserError(
                f"{self.where}: column {column!r} is {value!r:.40}, but must be a number{reason}: fix or remove the row"
            ) from None

    def text(self, column: str) -> str:
        """The text in a column, which must not be empty.

        Raises:
            UserError: If it is empty or not a string.
        """
        value = self.value(column)
        if not isinstance(value, str) or not value.strip():
            raise UserError(
                f"{self.where}: column {column!r} is {value!r:.40}, but must be text: fix or remove the row"
            )
        return value


def read_split(
    tables: Tables,
    split: str,
    key: Callable[[Row], str],
    known: Sequence[Format] = FORMATS,
    report: Optional[ReadReport] = None,
) -> Iterator[Row]:
    """The rows of a split, in the order of the files, one at a time.

    Args:
        tables: The files.
        split: Name of the split.
        key: The part of a row that decides whether it is held out for validation; rows with the same key stay together.
        known: Formats that have short names and are detected by the suffixes of files.
        report: See `read_file`.

    Raises:
        UserError: If a row cannot be read; names the file and line. If there are no rows.
    """
    check_fraction(tables)
    names = sources(tables, split)
    if not names:
        raise UserError(f"the {split} split has no rows: give files with --data.tables.{split}")
    read = read_hub if tables.hub else functools.partial(read_files, known=known, report=report)
    rows: Iterator[Row] = itertools.chain.from_iterable(read(name, tables) for name in names)
    first = next(rows, None)
    if first is None:
        raise UserError(f"the {split} split has no rows, as there are none in {', '.join(names)}: give other files")
    rows = itertools.chain([first], rows)
    if split in ("train", "validation") and not tables.validation:
        rows = part(rows, split, key, tables.validation_fraction)
    yield from rows


def part(
    rows: Iterable[Row], split: str, key: Callable[[Row], str], fraction: float, option: str = PREFIX
) -> Iterator[Row]:
    """The rows of `train` that are held out for validation, or the others.

    Args:
        rows: All of them.
        split: `validation` or `train`.
        key: See `read_split`.
        fraction: `tables.validation_fraction`.
        option: Prefix of the options with the files, for messages.

    Raises:
        UserError: If there are none.
    """
    number, found = 0, False
    for row in rows:
        number += 1
        if held_out(key(row), fraction) == (split == "validation"):
            found = True
            yield row
    if not found:
        raise UserError(
            f"the {split} split has no rows, as with --data.tables.validation_fraction {fraction:g}, none of the "
            f"{number:,} rows of {option}.train is {'held out' if split == 'validation' else 'left'}: change it, or "
            f"give files with {option}.validation"
        )


def check_fraction(tables: Tables) -> None:
    """Refuses an invalid `validation_fraction`."""
    if not 0 <= tables.validation_fraction < 1:
        raise UserError(
            f"--data.tables.validation_fraction is {tables.validation_fraction}, but must be from 0 to below 1"
        )


def sources(tables: Tables, split: str) -> list[str]:
    """The files, folders and patterns of a split, or the names of splits on the Hub."""
    instead = {"validation": tables.train, "predict": tables.test}
    return list(getattr(tables, split) or instead.get(split, []))


def are_csv(tables: Tables, split: str, known: Sequence[Format]) -> bool:
    """Whether all files of a split are CSV or TSV files."""
    paths = [path for pattern in sources(tables, split) for _, path in expand(pattern)]
    found = [formats.find(path, tables.format, known, PREFIX) for path in paths]
    return bool(found) and all(isinstance(each, formats.Csv) for each in found)


def read_hub(split: str, tables: Tables) -> Iterator[Row]:
    """The rows of a split on the Hub; numbers of labels are converted to the names of the labels."""
    name = str(tables.hub)
    rows = hub_rows(name, tables.hub_config, split, tables.hub_revision, False, "HF_HUB_OFFLINE=1")
    for number, values in rows:
        yield Row(values, f"{name} ({split}):{number}")


def read_files(
    pattern: str, tables: Tables, known: Sequence[Format] = FORMATS, report: Optional[ReadReport] = None
) -> Iterator[Row]:
    """The rows of a file, of the files in a folder, or of all files that match a pattern."""
    for _, path in expand(pattern):
        yield from read_file(path, tables, known, report)


def read_file(
    path: Path, tables: Tables, known: Sequence[Format] = FORMATS, report: Optional[ReadReport] = None
) -> Iterator[Row]:
    """The rows of a file.

    Args:
        path: The file.
        tables: How it is read.
        known: See `read_split`.
        report: Gets what was detected or replaced. Default: it is printed at the end.
    """
    file_format = formats.find(path, tables.format, known, PREFIX)
    if file_format is None:
        raise UserError(
            f"{path} does not have the suffix of a table: give its format with --data.tables.format csv (or tsv, jsonl)"
        )
    for option in ("header", "delimiter", "quoting"):
        if getattr(tables, option) is not None and option not in file_format.options:
            accepted = [suffix for other in known if option in other.options for suffix in other.suffixes]
            raise UserError(
                f"{path}: --data.tables.{option} is only for the formats {', '.join(accepted)}: omit the option"
            )
    options = ReadOptions(
        PREFIX, tables.encoding, tables.encoding_errors, tables.delimiter, tables.quoting, tables.header
    )
    own = ReadReport() if report is None else report
    replaced = own.replaced_bytes
    for number, values in file_format.rows(path, options, own):
        where = f"{path}:{number}"
        try:
            values = encodable_values(values, where, options, own)
        except RecursionError:
            raise UserError(f"{where}: the row is nested too deeply: fix or remove it") from None
        yield Row(values, where, "header" in file_format.options)
    if own.replaced_bytes > replaced:
        own.notes.append(f"{path}: {own.replaced_bytes - replaced:,} invalid bytes were replaced by U+FFFD")
    for note in own.notes if report is None else ():
        rank_zero_only(print)(note)


def encodable_values(value: Any, where: str, options: ReadOptions, report: ReadReport) -> Any:
    """Checks or replaces lone surrogates of JSON, which cannot be encoded as UTF-8 and which no tokenizer accepts."""
    if isinstance(value, str):
        return value if value.isascii() else encodable(value, where, options, report)
    if isinstance(value, list):
        return [encodable_values(item, where, options, report) for item in value]
    if isinstance(value, dict):
        return {key: encodable_values(item, where, options, report) for key, item in value.items()}
    return value


def held_out(key: str, fraction: float) -> bool:
    """Whether a row is held out for validation, which depends only on its key."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
