"""Exact duplicates."""

import hashlib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from lm_lightning.data.documents import Documents
from lm_lightning.data.filter import CorpusFilter, Document, Finding, Removed
from lm_lightning.filters.words import longest_first, normalized, text_hash

RECORD = np.dtype([("number", "i8"), ("low", "u8"), ("high", "u8"), ("text", "u8")])


class ExactDuplicates(CorpusFilter):
    """Removes documents whose text is the same as that of another document.

    Of equal documents, one of the test split is kept if there is one, otherwise of the validation split; then the
    longest before normalization. 32 bytes of each document are held in memory.

    Args:
        normalize: Which differences do not count: `none`; those in white space (`spaces`); or those in white space,
            upper case and punctuation (`words`).
        min_characters: Shorter texts are kept even if they are equal, such as "Yes." in a dialogue of a novel, a
            paragraph a document.
        options: Arguments of `Filter`.
    """

    def __init__(
        self, normalize: Literal["none", "spaces", "words"] = "spaces", min_characters: int = 0, **options: Any
    ) -> None:
        super().__init__(**options)
        self.normalize, self.min_characters = normalize, min_characters

    def check(self) -> None:
        self.require("min_characters", 0)

    def measure(self, document: Document) -> tuple[int, int, int] | None:
        """Two halves of a 128-bit hash of the normalized text, and a hash of the text."""
        text = normalized(document.text, self.normalize)
        if len(text) < self.min_characters:
            return None
        digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=16).digest()
        return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little"), text_hash(document.text)

    def find(self, documents: Documents) -> Iterator[Finding | str]:
        measured = ((number, *hashes) for number, hashes in documents.map(self.measure))
        records = np.fromiter(measured, RECORD)
        numbers = records["number"]
        preferred = longest_first(documents.sizes[numbers], documents.splits[numbers], records["text"])
        records = records[preferred]
        records = records[np.lexsort((records["high"], records["low"]))]  # stable: the preferred one comes first
        same = (records["low"][1:] == records["low"][:-1]) & (records["high"][1:] == records["high"][:-1])
        first = np.maximum.accumulate(np.where(np.concatenate([[False], same]), 0, np.arange(len(records))))
        kept = records["number"][first] if len(records) else numbers
        removable = self.removable(documents)
        found = np.flatnonzero((kept != records["number"]) & removable[records["number"]])
        for position in found[np.argsort(records["number"][found])]:
            yield Finding(int(records["number"][position]), Removed("same text"), int(kept[position]))
