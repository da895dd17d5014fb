"""Formats of labelled words, CoNLL and CoNLL-U. A row is a sentence; its columns have lists with a cell per word."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Optional

from lm_lightning.data.formats import Format, Rows
from lm_lightning.data.reading import Line, ReadOptions, ReadReport, row_lines
from lm_lightning.errors import UserError


class Conll(Format):
    """Each line has a word with its labels; an empty line follows each sentence.

    Columns are separated by tabs or, in files without tabs, by spaces. Without the option `header`, they are named `0`,
    `1`, ... Lines -DOCSTART- are skipped.
    """

    name = "conll"
    suffixes = (".conll",)
    options = ("header",)

    def rows(self, path: Path, options: ReadOptions, report: ReadReport) -> Rows:
        return _sentences(path, options, report, self.cells, options.header)

    @staticmethod
    def cells(line: str) -> Optional[list[str]]:
        """Return the cells of a line; None if it is not a word."""
        return None if line.startswith("-DOCSTART-") else line.strip().split("\t" if "\t" in line.strip() else None)


class Conllu(Format):
    """The format of Universal Dependencies, without ranges (2-3) and empty words (2.1)."""

    name = "conllu"
    suffixes = (".conllu",)
    columns = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")

    def rows(self, path: Path, options: ReadOptions, report: ReadReport) -> Rows:
        return _sentences(path, options, report, self.cells, list(self.columns))

    @classmethod
    def cells(cls, line: str) -> Optional[list[str]]:
        """Return the cells of a line; None if it is not a word."""
        if line.startswith(("#", "-DOCSTART-")):
            return None
        cells = line.strip().split("\t")
        return cells if cells[0].isdigit() or len(cells) != len(cls.columns) else None


def _sentences(
    path: Path,
    options: ReadOptions,
    report: ReadReport,
    cells_of: Callable[[str], Optional[list[str]]],
    header: Optional[list[str]],
) -> Rows:
    words: list[list[str]] = []
    start = 0
    for line in itertools.chain(row_lines(path, options, report), [Line(0, "", True)]):
        if line.blank:
            if words:
                columns = [list(column) for column in zip(*words)]
                yield start, dict(zip(header or map(str, range(len(columns))), columns))
            words = []
            continue
        cells = cells_of(line.text)
        if cells is None:
            continue
        if not words:
            start = line.number
        width = len(words[0]) if words else len(header or cells)
        if len(cells) != width:
            raise UserError(f"{path}:{line.number}: the line has {len(cells)} columns, but must have {width}: fix it")
        words.append(cells)
