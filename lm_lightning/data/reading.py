"""Reads the lines of files, which may be compressed and in any encoding, one at a time."""

import codecs
import contextlib
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Optional

from lm_lightning import errors
from lm_lightning.errors import UserError

PIECE = 65536  # characters; longer texts are cut
LONGEST_ROW = 1 << 27  # maximum number of characters of a row, as a row has to fit into memory
EXPANSION = 200  # a compressed file may expand to this many times its size ...
ALWAYS_ALLOWED = 1 << 28  # ... or to this many bytes
package = partial(errors.package, what="this corpus", extra="data")
_SURROGATE = re.compile("[\ud800-\udfff]")  # "surrogateescape" replaces each invalid byte by one


class Line(NamedTuple):
    """A line without its line break, or a part of a line over `PIECE` characters."""

    number: int
    text: str
    blank: bool  # whether the full line consists of white space


@dataclass(frozen=True)
class ReadOptions:
    """How files are read.

    Args:
        prefix: Prefix of the options that set this, such as `--data.corpus`, for messages.
        encoding: Python's name of the files' encoding.
        encoding_errors: Whether to refuse bytes that are invalid in the encoding (`strict`), or to `replace` each by
            U+FFFD.
        delimiter: Character between the columns of CSV and TSV files. None: a comma or a tab, depending on the suffix.
        quoting: Whether cells of CSV and TSV files may be enclosed in double quotes. None: only those of CSV files.
        header: Names of the columns, for files without a header line.
        columns: Required columns; some formats do not read the others. None: all.
        max_line: Maximum length of a line of plain text in characters; 0 allows any length.
    """

    prefix: str
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
                f"{self.prefix}.encoding {self.encoding!r} is unknown: use one such as utf-8, utf-16, cp1252, gb18030"
            ) from None
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n'):
            raise UserError(f"{self.prefix}.delimiter is {self.delimiter!r}, but must be one character, such as ';'")

    @property
    def codec(self) -> str:
        """The encoding; the one for UTF-8 skips a byte order mark."""
        return "utf-8-sig" if codecs.lookup(self.encoding).name == "utf-8" else self.encoding


@dataclass
class ReadReport:
    """Counts of what was replaced or skipped, and notes about individual files, which are printed at the end.

    Attributes:
        opened: The files that are being read, before decompression.
        finished_bytes: Size of the files that have been read.
    """

    replaced_bytes: int = 0
    empty_rows: int = 0
    notes: list[str] = field(default_factory=list)
    opened: list[BinaryIO] = field(default_factory=list)
    finished_bytes: int = 0

    def read_bytes(self) -> int:
        """Number of bytes of the files that have been read so far, before decompression."""
        return self.finished_bytes + sum(file.tell() for file in self.opened)


def suffixes(path: Path) -> tuple[str, str]:
    """Return the suffixes of format and compression: (".jsonl", ".gz") for a.jsonl.gz, ("", "") for a file "a"."""
    *_, form, last = ["", ""] + [suffix.lower() for suffix in path.suffixes]
    return (form, last) if last in _OPENERS else (last, "")


def encodable(text: str, where: str, options: ReadOptions, report: ReadReport, column: int = 0) -> str:
    """Return `text` so that it can be encoded as UTF-8: checks invalid bytes and lone surrogates, as in JSON."""
    if not (bad := _SURROGATE.search(text)):
        return text
    if options.encoding_errors == "strict":
        code, name = ord(bad[0]), codecs.lookup(options.encoding).name.upper()
        what = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"character U+{code:04X}"
        raise UserError(
            f"{where}: {what} at column {column + bad.start() + 1} is not {name}: give the encoding of the file, such "
            f"as {options.prefix}.encoding cp1252 (or utf-16, gb18030), or replace invalid bytes with "
            f"{options.prefix}.encoding_errors replace"
        )
    text, replaced = _SURROGATE.subn("\ufffd", text)
    report.replaced_bytes += replaced
    return text


def _open_zst(file: BinaryIO) -> Any:
    # Unlike the zstandard package, pyarrow reports truncated files, and reads all frames of a file.
    return package("pyarrow").input_stream(file, compression="zstd")


_OPENERS: dict[str, Callable[[Any], Any]] = {".gz": gzip.open, ".zst": _open_zst}


class _Expanding(io.RawIOBase):
    """The uncompressed bytes of a compressed file; limits the expansion, as a malicious file can expand to any size."""

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
                f"{self.path} expands to more than {EXPANSION} times its size, which is unusual for text: if it is "
                "correct, decompress the file first"
            )
        buffer[: len(data)] = data
        return len(data)


@contextlib.contextmanager
def opened(path: Path, report: Optional[ReadReport] = None) -> Iterator[BinaryIO]:
    """Open a file for its uncompressed bytes; errors while it is open are converted to UserErrors.

    If there is a `report`, it shows how far the file has been read.
    """
    compression = suffixes(path)[1]
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open(path, "rb"))
            if report is not None:
                report.opened.append(file)
                stack.callback(_finish, report, file, path.stat().st_size)
            if compression:
                yield io.BufferedReader(_Expanding(stack.enter_context(_OPENERS[compression](file)), path), 1 << 17)
            else:
                yield file
    except (OSError, EOFError, zlib.error, UnicodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): is it damaged or incomplete?") from None


def _finish(report: ReadReport, file: BinaryIO, size: int) -> None:
    report.opened.remove(file)
    report.finished_bytes += size


def lines(path: Path, options: ReadOptions, report: ReadReport, plain: bool = False) -> Iterator[Line]:
    """Yield the lines of a file. In `plain` text, long lines are yielded in parts, or refused if over `max_line`."""
    with opened(path, report) as stream:
        # newline="\n", as by default a lone carriage return would also end a line.
        text = io.TextIOWrapper(stream, encoding=options.codec, errors="surrogateescape", newline="\n")
        size = PIECE if plain else LONGEST_ROW
        number, length = 1, 0
        while part := text.readline(size):
            while part[-1] == "\r" and (following := text.readline(1)):
                part += following  # a part must not end within a CRLF
            ended = part[-1] == "\n"
            if len(part) >= LONGEST_ROW and not ended:
                raise UserError(
                    f"{path}:{number}: the line has more than {LONGEST_ROW:,} characters, the maximum of a row: split "
                    "it"
                )
            if ended:
                part = part[: -2 if part.endswith("\r\n") else -1]
            if "\0" in part:
                if options.encoding_errors == "strict":
                    raise UserError(
                        f"{path}:{number}: a NUL byte at column {length + part.index(chr(0)) + 1}, which text does not "
                        f"have: if the file is UTF-16, give {options.prefix}.encoding utf-16; otherwise replace such "
                        f"bytes with {options.prefix}.encoding_errors replace"
                    )
                report.replaced_bytes += part.count("\0")
                part = part.replace("\0", "\ufffd")
            if not part.isascii():
                part = encodable(part, f"{path}:{number}", options, report, column=length)
            blank = length == 0 and not part.strip() and (ended or len(part) < PIECE)
            length += len(part)
            if plain and 0 < options.max_line < length:
                hint = "; its lines end with CR alone: convert these to LF" if "\r" in part.strip("\r") else ""
                while not ended and (part := text.readline(size)):
                    ended = part.endswith("\n")
                    length += len(part) - ended
                raise UserError(
                    f"{path}:{number}: the line has {length} characters, more than {options.prefix}.max_line "
                    f"({options.max_line}){hint or f'; if it is text, give {options.prefix}.max_line 0'}"
                )
            yield Line(number, part, blank)
            if ended:
                number, length = number + 1, 0


def row_lines(path: Path, options: ReadOptions, report: ReadReport) -> Iterator[Line]:
    """Yield the lines of a file of rows, and refuse lines that contain a carriage return (CR)."""
    for line in lines(path, options, report):
        if "\r" in line.text:
            raise lone_cr(path, line)
        yield line


def lone_cr(path: Path, line: Line) -> UserError:
    """Return the error for a carriage return within a line."""
    return UserError(
        f"{path}:{line.number}: the line contains a carriage return (CR) at column {line.text.index(chr(13)) + 1}: "
        "convert the line ends of the file from CR to LF, or remove the CR"
    )
