"""Where the documents of a corpus are read from: its files or, if it has filters, the documents that these left."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

from lm_lightning.data import cache as cached
from lm_lightning.data import corpus as corpora
from lm_lightning.data import documents, filtering
from lm_lightning.data.corpus import Corpus, Piece


class Source:
    """The documents to tokenize. The corpus is filtered when they are first needed, unless the cache has the result.

    Args:
        corpus: The corpus.
        cache: Folder of the cache.
        folder: Folder of the filtered corpus, named by a fingerprint of everything that determines it.
    """

    def __init__(self, corpus: Corpus, cache: Path, folder: Path) -> None:
        self.corpus, self.cache, self.folder = corpus, cache, folder

    @functools.cached_property
    def filtered(self) -> Optional[Path]:
        """The folder of the filtered corpus; None if the corpus has no filters."""
        if not self.corpus.filters:
            return None
        cached.make_once(self.folder, self.cache, "filtering the corpus", self._filter)
        return self.folder

    def _filter(self, folder: Path) -> None:
        pieces, total = corpora.read(self.corpus, self.cache), corpora.total_bytes(self.corpus, self.cache)
        filtering.filter_corpus(self.corpus.filters, pieces, total, self.corpus.filter_processes, folder)

    def read(self) -> Iterator[Piece]:
        """Yields the pieces of all documents, in the same order on every call."""
        if self.filtered is None:
            yield from corpora.read(self.corpus, self.cache)
            return
        for split, name, text in documents.saved(self.filtered):
            for part, last in corpora.cut([text]):
                yield Piece(split, name, part, last)

    def total_bytes(self) -> Optional[int]:
        """The approximate number of UTF-8 bytes that `read` yields; None if unknown."""
        if self.filtered is None:
            return corpora.total_bytes(self.corpus, self.cache)
        return int(self._info["after"]["bytes"])

    def report(self) -> dict[str, Any]:
        """What the filters have done, JSON-serializable, for `data.json`, see `filtering.Tally`; empty without any."""
        if self.filtered is None:
            return {}
        listing = {"listing": str(self.filtered / "filtered.jsonl")}
        return {
            "filtered": {name: self._info[name] for name in ("before", "after")} | listing,
            "filters": self._info["filters"],
        }

    @functools.cached_property
    def _info(self) -> dict[str, Any]:
        assert self.filtered is not None
        return json.loads((self.filtered / "info.json").read_text(encoding="utf-8"))
