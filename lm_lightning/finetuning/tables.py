"""Tables: rows with named columns, from files in any of several formats or from the Hugging Face Hub."""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
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

PREFIX = "--data.tables"  # of the options, for messages
FORMATS: tuple[Format, ...] = (*formats.FORMATS, Conll(), Conllu())  # of all tables; a task may know more


@dataclass
class Tables:
    """Where the rows of each split come from.

    Args:
        train: Files, folders or patterns of the training split: JSONL, CSV, TSV, Parquet; of words with labels also
            CoNLL (a word on each line with its labels) and CoNLL-U; of questions also JSON in the form of SQuAD. Each
            may be compressed as .gz or .zst.
        validation: The same of the validation split. Without any, rows of `train` are held out by a hash of their
            text, so that no text is in both.
        test: The same of the test split.
        predict: The same of the rows that `predict` predicts; they need no labels. Default: those of `test`.
        validation_fraction: Share of `train` for validation, where no files are given for it.
        format: Format of all files, where their names do not tell: `jsonl`, `csv`, `tsv`, `parquet`, `conll`, `conllu`
            or, of questions, `squad`; or the class path of your own subclass of `lm_lightning.data.formats.Format`.
        header: Names of the columns, for CSV and TSV files whose first line is a row already, and for CoNLL files,
            whose columns are `0`, `1`, ... without it.
        delimiter: Character between the columns of CSV and TSV files. Default: a tab in TSV files, a comma in CSV files
            or, if their first line has no comma, the semicolon, tab or bar in it.
        quoting: Whether double quotes enclose cells of CSV and TSV files. Default: in CSV files only.
        encoding: Encoding of the files, such as `utf-8`, `utf-16`, `cp1252` or `gb18030`.
        encoding_errors: What to do with bytes that the encoding does not allow: stop (`strict`), or `replace` each by
            U+FFFD and report their number.
        hub: Name of a data set of the Hugging Face Hub; `train` and the others then name its splits, not files.
        hub_config: Its configuration.
        hub_revision: Its branch, tag or commit.
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
        """The options, JSON-able."""
        return asdict(self) | {"format": formats.identity(self.format)}


class Row(Mapping):
    """A row of a table, which knows where it is from.

    Args:
        values: By the names of the columns.
        where: File and number of the line, for messages.
        header: Whether the option `header` decides what its columns are called, for messages.
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
                f"{self.where}: there is no column {column!r}; the columns are {', '.join(map(str, self))}: name the "
                "right one with --data.columns"
                + (", or all of them with --data.tables.header" if self.header else "")
                + (delimiter_hint(self, PREFIX) if self.header else "")
            )
        return self[column]

    def words(self, column: str) -> list[str]:
        """A column's words, of which there is at least one.

        They are a list, a string that spells a list as JSON or Python writes it, or a string with spaces between them.

        Raises:
            UserError: If it is none of these.
        """
        value = self.value(column)
        words = self.entries(column)
        if isinstance(value, str) and not all(isinstance(word, str) for word in words or [None]):
            words = value.split()
        if not words or not all(isinstance(w, str) and w.strip() for w in words):
            raise UserError(f"{self.where}: column {column!r} has no words, but {value!r:.40}: fix or remove the row")
        return words

    def entries(self, column: str, strict: bool = False) -> Optional[list]:
        """A column's list, also if a string spells it as JSON or Python writes it; None if there is none.

        Raises:
            UserError: If a string looks like a list, but cannot be read, see `cells.as_list`.
        """
        value = self.value(column)
        try:
            return cells.as_list(value, strict)
        except ValueError as error:
            raise UserError(
                f"{self.where}: column {column!r} has {value!r:.40}, which looks like a list, but cannot be read "
                f'({error}): write it as JSON, such as ["a", "b"]'
            ) from None

    def number(self, column: str) -> float:
        """A column's number, which is finite, also as float32.

        Raises:
            UserError: If it has none.
        """
        value = self.value(column)
        try:
            return cells.number(value)
        except ValueError as error:
            reason = f" ({error})" if str(error) else ""
            raise UserError(
                f"{self.where}: column {column!r} has no number, but {value!r:.40}{reason}: fix or remove the row"
            ) from None

    def text(self, column: str) -> str:
        """A column's text, which may not be empty.

        Raises:
            UserError: If it is not there.
        """
        value = self.value(column)
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{self.where}: column {column!r} has no text, but {value!r:.40}: fix or remove the row")
        return value


def read_split(tables: Tables, split: str, key: Callable[[Row], str], known: Sequence[Format] = FORMATS) -> list[Row]:
    """The rows of a split, in the order of the files.

    Args:
        tables: Where they are.
        split: Its name.
        key: What of a row decides whether it is held out for validation: rows of one key stay together.
        known: Formats that are found by the names of files, and have short names.

    Raises:
        UserError: Names the file and line of what cannot be read.
    """
    if not 0 <= tables.validation_fraction < 1:
        raise UserError(f"--data.tables.validation_fraction is {tables.validation_fraction}, but must be from 0 to 1")
    names = sources(tables, split)
    read = read_hub if tables.hub else functools.partial(read_files, known=known)
    rows = [row for name in names for row in read(name, tables)]
    if not names:
        raise UserError(f"the {split} split has no rows: name files with --data.tables.{split}")
    if not rows:
        raise UserError(f"the {split} split has no rows, as there are none in {', '.join(names)}: give other files")
    if split in ("train", "validation") and not tables.validation:
        total = len(rows)
        rows = [row for row in rows if held_out(key(row), tables.validation_fraction) == (split == "validation")]
        if not rows:
            raise UserError(
                f"the {split} split has no rows, as none of the {total:,} of --data.tables.train is "
                f"{'held out' if split == 'validation' else 'left'} by --data.tables.validation_fraction "
                f"{tables.validation_fraction:g}: change that, or name files with --data.tables.validation"
            )
    return rows


def sources(tables: Tables, split: str) -> list[str]:
    """Where the rows of a split are: files, folders and patterns, or the names of splits on the Hub."""
    instead = {"validation": tables.train, "predict": tables.test}
    return list(getattr(tables, split) or instead.get(split, []))


def read_hub(split: str, tables: Tables) -> Iterator[Row]:
    """The rows of a split on the Hub, where labels that are numbers with names have their names."""
    name = str(tables.hub)
    rows = hub_rows(name, tables.hub_config, split, tables.hub_revision, False, "HF_HUB_OFFLINE=1")
    for number, values in rows:
        yield Row(values, f"{name} ({split}):{number}")


def read_files(pattern: str, tables: Tables, known: Sequence[Format] = FORMATS) -> Iterator[Row]:
    """The rows of a file, of the files in a folder, or of all that match a pattern."""
    for _, path in expand(pattern):
        yield from read_file(path, tables, known)


def read_file(path: Path, tables: Tables, known: Sequence[Format] = FORMATS) -> Iterator[Row]:
    """The rows of a file. Afterwards, what was detected or replaced is printed."""
    file_format = formats.find(path, tables.format, known, PREFIX)
    if file_format is None:
        raise UserError(
            f"{path} is no table by its name: give its format with --data.tables.format csv (or tsv, jsonl)"
        )
    for option in ("header", "delimiter", "quoting"):
        if getattr(tables, option) is not None and option not in file_format.options:
            accepted = [suffix for other in known if option in other.options for suffix in other.suffixes]
            raise UserError(f"{path}: --data.tables.{option} is for files of the formats {', '.join(accepted)}")
    options = ReadOptions(
        PREFIX, tables.encoding, tables.encoding_errors, tables.delimiter, tables.quoting, tables.header
    )
    report = ReadReport()
    for number, values in file_format.rows(path, options, report):
        where = f"{path}:{number}"
        try:
            values = encodable_values(values, where, options, report)
        except RecursionError:
            raise UserError(f"{where}: the row is nested too deeply: fix or remove it") from None
        yield Row(values, where, "header" in file_format.options)
    if report.replaced_bytes:
        report.notes.append(f"{path}: {report.replaced_bytes:,} bytes that could not be read were replaced by U+FFFD")
    for note in report.notes:
        rank_zero_only(print)(note)


def encodable_values(value: Any, where: str, options: ReadOptions, report: ReadReport) -> Any:
    """A value without characters that UTF-8 cannot express and no tokenizer accepts: half surrogate pairs of JSON."""
    if isinstance(value, str):
        return value if value.isascii() else encodable(value, where, options, report)
    if isinstance(value, list):
        return [encodable_values(item, where, options, report) for item in value]
    if isinstance(value, dict):
        return {key: encodable_values(item, where, options, report) for key, item in value.items()}
    return value


def held_out(key: str, fraction: float) -> bool:
    """Whether a row is one of the held-out share, which only its own key decides."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
