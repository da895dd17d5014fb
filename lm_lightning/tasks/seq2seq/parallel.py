"""Parallel text files: line by line, the texts of one file belong to those of another."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from lm_lightning.data.corpus import expand
from lm_lightning.data.reading import Line, ReadOptions, ReadReport, row_lines
from lm_lightning.errors import UserError
from lm_lightning.finetuning.tables import Row, Tables

PREFIX = "--data.parallel"


@dataclass
class Parallel:
    """Text files with a text in each line, instead of tables. They may be compressed as .gz or .zst.

    Args:
        train: Two files of the training split: sources and targets.
        validation: The same for the validation split. Default: rows of `train` are held out, see
            `tables.validation_fraction`.
        test: The same for the test split.
        predict: A file of sources for which `predict` computes targets. Default: those of `test`.
    """

    train: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)
    predict: list[str] | str = field(default_factory=list)

    def __post_init__(self) -> None:
        if isinstance(self.predict, str):
            self.predict = [self.predict]

    def given(self) -> bool:
        """Whether there are any files."""
        return bool(self.train or self.validation or self.test or self.predict)

    def files(self, split: str) -> list[Path]:
        """The files of a split: sources and, except for `predict`, targets.

        Raises:
            UserError: If there are none, or not two.
        """
        instead = {"validation": self.train, "predict": self.test}
        names = getattr(self, split) or instead.get(split, [])
        if not names:
            raise UserError(f"the {split} split has no rows: give files with {PREFIX}.{split}")
        if len(names) != 2 and not (split == "predict" and len(names) == 1):
            raise UserError(
                f"{PREFIX}.{split} has {len(names)} files ({', '.join(map(str, names))}), but must have two: sources "
                "and targets"
            )
        return [file_of(name) for name in names]


def file_of(name: str) -> Path:
    """The file that a name or pattern stands for.

    Raises:
        UserError: If there is none, or several.
    """
    paths = [path for _, path in expand(name)]
    if len(paths) != 1:
        raise UserError(f"{name} is {len(paths)} files, but parallel texts need one: give its name")
    return paths[0]


def read_parallel(files: list[Path], columns: tuple[str, str], tables: Tables, report: ReadReport) -> Iterator[Row]:
    """The rows of parallel files; texts may be empty.

    Args:
        files: One of sources, or two: sources and targets.
        columns: Names for sources and targets.
        tables: Its `encoding` and `encoding_errors` are used.
        report: Gets the number of replaced bytes.

    Raises:
        UserError: If the files have different numbers of lines, or cannot be read.
    """
    options = ReadOptions("--data.tables", tables.encoding, tables.encoding_errors)
    counts = [0] * len(files)
    for lines in zip_longest(*(row_lines(path, options, report) for path in files)):
        for place, line in enumerate(lines):
            counts[place] += line is not None
        if all(isinstance(line, Line) for line in lines) and len(set(counts)) == 1:
            texts = (line.text.strip() for line in lines)
            yield Row(dict(zip(columns, texts)), f"{files[0]}:{lines[0].number}")
    if len(set(counts)) > 1:
        raise UserError(
            f"{files[0]} has {counts[0]:,} lines, but {files[1]} has {counts[1]:,}: give files whose lines belong "
            "together"
        )
    if report.replaced_bytes:
        names = " and ".join(map(str, files))
        report.notes.append(f"{names}: {report.replaced_bytes:,} invalid bytes were replaced by U+FFFD")
