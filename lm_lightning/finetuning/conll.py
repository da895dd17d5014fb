"""Formats of labelled words, CoNLL and CoNLL-U: a file in, its sentences out, each a list of cells for each column."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Optional

from lm_lightning.data.formats import Format, Rows
from lm_lightning.data.reading import Line, ReadOptions, ReadReport, row_lines
from lm_lightning.errors import UserError


class Conll(Format):
    """A word on each line with its labels, and an empty line after each sentence.

    The columns are separated by tabs, or else by spaces, and are called `0`, `1`, ... without the option `header`.
    Lines -DOCSTART- are no words.
    """

    name = "conll"
    suffixes = (".conll",)
    options = ("header",)

    def rows(self, path: Path, options: ReadOptions, report: ReadReport) -> Rows:
        return _sentences(path, options, report, self.cells, options.header)

    @staticmethod
    def cells(line: str) -> Optional[list[str]]:
        """Return the cells of a line, None if it is no word."""
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
        """Return the cells of a line, None if it is no word."""
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
