"""Overlap of training documents with other texts, by sequences of words: other splits, and benchmarks.

Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C: sequences of 13 words, in lower case without
punctuation; those in more than ten training documents are ignored, as they are common phrases.
"""

import functools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np

from lm_lightning import files
from lm_lightning.data.corpus import Corpus, expand, read
from lm_lightning.data.documents import Documents
from lm_lightning.data.filter import CorpusFilter, Document, Finding, Marked, Removed
from lm_lightning.data.verdicts import SPLITS, SplitName
from lm_lightning.errors import UserError
from lm_lightning.filters.words import ngrams, word_hashes


class CorpusOverlap(CorpusFilter):
    """Base class of filters that find training documents which share sequences of words with reference texts.

    8 bytes of each different sequence of the reference texts are in memory and on disk, and 16 bytes of each sequence
    that a training document shares with them.

    Args:
        ngram: Number of words of a sequence.
        common: Sequences in more than this number of training documents are ignored. Null: none are.
        min_shared: Least number of different sequences that a document shares with the reference texts.
        action: Whether documents are removed, or only marked and reported (`mark`).
        splits: Splits whose documents may be removed or marked.
    """

    def __init__(
        self,
        ngram: int = 13,
        common: Optional[int] = 10,
        min_shared: int = 1,
        action: Literal["remove", "mark"] = "remove",
        splits: Sequence[SplitName] = ("train",),
    ) -> None:
        super().__init__(list(splits))
        self.ngram, self.common, self.min_shared, self.action = ngram, common, min_shared, action

    def check(self) -> None:
        self.require("ngram", 1, 1000)
        self.require("common", 1)
        self.require("min_shared", 1)

    def references(self, documents: Documents) -> Iterator[tuple[str, np.ndarray]]:
        """The reference texts: a group, by which documents are counted, and the 64-bit hashes of its sequences."""
        raise NotImplementedError

    def sizes(self) -> list[int]:
        """Numbers of words of the sequences to compare."""
        return [self.ngram]

    def find(self, documents: Documents) -> Iterator[Finding | str]:
        groups, owners, hashes = self.table(documents)
        # Each filter has a new name for its table, as the processes remember the table of a name.
        with tempfile.NamedTemporaryFile(
            prefix="temporary-ngrams-", suffix=".npy", dir=documents.folder, delete=False
        ) as table:
            np.save(table, hashes)
        hits = documents.folder / "temporary-hits"
        function = functools.partial(shared, path=table.name, sizes=self.sizes())
        with open(hits, "wb") as file:
            counts = np.fromiter(
                (
                    (number, file.write(found) // 8)
                    for number, found in documents.map(function, self.removable(documents))
                ),
                np.dtype([("number", "i8"), ("count", "i8")]),
            )
        places = np.fromfile(hits, np.int64)  # in the table
        uses = np.bincount(places, minlength=len(hashes))
        ignored = uses > (len(documents) if self.common is None else self.common)
        start = 0
        for number, count in counts.tolist():
            own = places[start : start + count]
            own, start = own[~ignored[own]], start + count
            if len(own) >= self.min_shared:
                kind = Removed if self.action == "remove" else Marked
                yield Finding(number, kind(groups[owners[own[0]]], f"{len(own)} shared {self.ngram}-grams"))
        if ignored.any():
            yield f"{ignored.sum():,} of {len(hashes):,} sequences are in more than {self.common} documents: ignored"
        yield from self.notes(uses, ignored, hashes)

    def table(self, documents: Documents) -> tuple[list[str], np.ndarray, np.ndarray]:
        """The names of the groups; the group of each sequence, (sequences,) uint16; their sorted hashes, uint64."""
        groups: dict[str, int] = {}
        parts, owners = [], []
        for group, found in self.references(documents):
            parts.append(found)
            owners.append(np.full(len(found), groups.setdefault(group, len(groups)), np.uint16))
        if not parts:
            return [], np.zeros(0, np.uint16), np.zeros(0, np.uint64)
        hashes, first = np.unique(np.concatenate(parts), return_index=True)
        return list(groups), np.concatenate(owners)[first], hashes

    def notes(self, uses: np.ndarray, ignored: np.ndarray, hashes: np.ndarray) -> Iterator[str]:
        """Sentences for the report.

        Args:
            uses: Number of documents that have each sequence, (sequences,) int64.
            ignored: Whether each sequence is ignored as common, (sequences,) bool.
            hashes: Hashes of the sequences, sorted, (sequences,) uint64.
        """
        return iter(())


class SplitOverlap(CorpusOverlap):
    """Removes training documents that share a sequence of words with a document of another split.

    Without it, results on the validation and test splits may measure what the network has memorized. It compares with
    the documents of all splits that are not in `splits`.

    Args:
        options: Arguments of `CorpusOverlap`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)

    def check(self) -> None:
        super().check()
        if len(set(self.splits)) == len(SPLITS):
            raise UserError("splits of the filter SplitOverlap has all splits, so that there is none to compare with")

    def references(self, documents: Documents) -> Iterator[tuple[str, np.ndarray]]:
        for split in SPLITS:
            if split not in self.splits:
                where = documents.splits == SPLITS.index(split)
                for _, found in documents.map(functools.partial(sequences, size=self.ngram), where):
                    yield split, np.frombuffer(found, np.uint64)


class Contamination(CorpusOverlap):
    """Removes or marks training documents that share a sequence of words with a benchmark.

    The report has the number of examples of each benchmark that were found in the training split.

    Args:
        paths: Files, folders or patterns of the benchmarks, in the formats of corpora.
        text_column: Column with the text of an example, in all formats except plain text.
        document: What an example of a plain text file is: the file, a paragraph or a line.
        min_ngram: Examples with fewer words than `ngram` are compared as a whole if they have at least this number.
        options: Arguments of `CorpusOverlap`.
    """

    def __init__(
        self,
        paths: list[str],
        text_column: str = "text",
        document: Literal["file", "paragraph", "line"] = "line",
        min_ngram: int = 8,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.paths, self.text_column, self.document, self.min_ngram = paths, text_column, document, min_ngram

    def check(self) -> None:
        super().check()
        self.require("min_ngram", 1)

    def identity(self) -> dict[str, Any]:
        """The options and, instead of the paths, the names and contents of the files."""
        content = {name: value for name, value in super().identity().items() if name != "paths"}
        return content | {"files": [[name, files.checksum(path)] for name, path in self.files()]}

    def files(self) -> list[tuple[str, Path]]:
        """Name and path of each file."""
        return [found for pattern in self.paths for found in expand(pattern)]

    def sizes(self) -> list[int]:
        return list(range(min(self.min_ngram, self.ngram), self.ngram + 1))

    def examples(self) -> Iterator[tuple[str, np.ndarray]]:
        """The name of the file and the hashes of the sequences of each example."""
        for name, path in self.files():
            options: dict[str, Any] = {"document": self.document, "text_column": self.text_column}
            benchmark = Corpus([str(path)], max_line=0, validation_fraction=0, test_fraction=0, **options)
            benchmark.prefix = "filters.Contamination"  # for messages
            text = ""
            for piece in read(benchmark, path.parent):
                text += piece.text
                if piece.last:
                    words = word_hashes(text)
                    yield name, ngrams(words, max(min(self.ngram, len(words)), min(self.min_ngram, self.ngram)))
                    text = ""

    def references(self, documents: Documents) -> Iterator[tuple[str, np.ndarray]]:
        return self.examples()

    def notes(self, uses: np.ndarray, ignored: np.ndarray, hashes: np.ndarray) -> Iterator[str]:
        counts: dict[str, list[int]] = {}
        for name, found in self.examples():
            places = np.searchsorted(hashes, found)
            shared_too = bool((uses[places] > 0).any() and ((uses[places] > 0) & ~ignored[places]).any())
            count = counts.setdefault(name, [0, 0, 0])
            for position, value in enumerate((1, shared_too, not len(found))):
                count[position] += value
        for name, (examples, found_too, short) in counts.items():
            yield f"{name}: {found_too:,} of {examples:,} examples ({found_too / examples:.2%}) were found" + (
                f"; {short:,} have fewer than {self.min_ngram} words and cannot be found" if short else ""
            )


def sequences(document: Document, size: int) -> Optional[bytes]:
    """The different hashes of the sequences of `size` words of a document; None if there are none."""
    return np.unique(ngrams(word_hashes(document.text), size)).tobytes() or None


def shared(document: Document, path: str, sizes: list[int]) -> Optional[bytes]:
    """Where the sequences of a document are in a sorted table of hashes, int64; None if it has none of them."""
    table, words = _table(path), word_hashes(document.text)
    if not len(table):
        return None
    found = []
    for size in sizes:
        hashes = np.unique(ngrams(words, size))
        places = np.searchsorted(table, hashes)
        places[places == len(table)] = 0
        found.append(places[table[places] == hashes])
    return np.concatenate(found).tobytes() or None


@functools.lru_cache(maxsize=1)
def _table(path: str) -> np.ndarray:
    return np.load(path, mmap_mode="r")
