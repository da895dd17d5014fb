"""Near duplicates: candidates by MinHash and locality-sensitive hashing, then the true similarity of each.

Broder 1997, "On the resemblance and containment of documents"; Leskovec, Rajaraman and Ullman, "Mining of Massive
Datasets", chapter 3.
"""

import functools
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Optional

import numpy as np

from lm_lightning import errors
from lm_lightning.data.documents import Documents
from lm_lightning.data.filter import CorpusFilter, Document, Finding, Removed
from lm_lightning.filters.words import longest_first, mixed, shingles, text_hash, word_hashes

FOUND = 0.98  # probability that a pair whose similarity is the threshold becomes a candidate
ERRORS = 3  # standard errors by which the estimate from signatures may be below the threshold
CHUNK = 1 << 12  # shingles whose hashes are computed at once
CACHED = 1 << 24  # shingles of documents that are remembered, 8 bytes each


class NearDuplicates(CorpusFilter):
    """Removes documents that are similar to another one, which is kept.

    The similarity is the Jaccard index of the sets of their shingles: sequences of `shingle` words without upper case
    and punctuation, padded at both ends; a character of Chinese or Japanese counts as a word. With the defaults, a copy
    is removed if less than about 2 % of its words, evenly distributed, were changed: of a text of 50 words, one.

    MinHash signatures only find candidates; a document is removed if its true similarity to a kept document reaches
    the threshold. Documents of the test and validation splits are preferred, then longer ones, so that the result does
    not depend on the order of the corpus. Of each document with at least `min_words` words, about 40 bytes are in
    memory and 4 x `hashes` bytes on disk; of each candidate, about 20 more bytes for each of the (by default 18) bands.

    Args:
        threshold: Least similarity of duplicates, from 0 (exclusive) to 1.
        shingle: Number of words of a shingle. Fewer find copies with more changes.
        min_words: Shorter documents are kept; `ExactDuplicates` removes those that are equal.
        same_numbers: Whether duplicates must contain the same numbers, so that texts made from a template, such as
            weather reports, are kept even if they differ in nothing else.
        hashes: Number of hashes of a signature.
        options: Arguments of `Filter`.
    """

    def __init__(
        self,
        threshold: float = 0.8,
        shingle: int = 5,
        min_words: int = 20,
        same_numbers: bool = False,
        hashes: int = 128,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.threshold, self.shingle, self.min_words = threshold, shingle, min_words
        self.same_numbers, self.hashes = same_numbers, hashes

    def check(self) -> None:
        self.require("threshold", 0.05, 1)
        self.require("shingle", 1, 100)
        self.require("min_words", 1)
        self.require("hashes", 16, 4096)
        errors.package("datasketch", "the filter NearDuplicates", "filters")

    def signature(self, document: Document) -> Optional[tuple[bytes, int]]:
        """The MinHash signature of a document and a hash of its text; None if it is too short."""
        words = word_hashes(document.text)
        if len(words) < self.min_words:
            return None
        from datasketch import MinHash

        # `int` stands for the hash function, as shingles are hashes already
        permutations = _permutations(self.hashes)
        minhash = MinHash(self.hashes, hashfunc=int, permutations=permutations, scheme="affine32")
        values = shingles(words, self.shingle) >> np.uint64(32)
        for start in range(0, len(values), CHUNK):
            minhash.update_batch(values[start : start + CHUNK].tolist())
        return minhash.hashvalues.astype("<u4").tobytes(), text_hash(document.text)

    def find(self, documents: Documents) -> Iterator[Finding | str]:
        path = documents.folder / "temporary-signatures"
        record = np.dtype([("number", "i8"), ("text", "i8")])
        with open(path, "wb") as file:

            def written() -> Iterator[tuple[int, int]]:
                for number, (signature, text) in documents.map(self.signature):
                    file.write(signature)
                    yield number, text

            records = np.fromiter(written(), record)
        if not len(records):
            return
        signatures = np.memmap(path, "<u4", "r", shape=(len(records), self.hashes))
        numbers = records["number"]
        rank = np.empty(len(records), np.int64)
        rank[longest_first(documents.sizes[numbers], documents.splits[numbers], records["text"])] = np.arange(len(rank))
        buckets = Buckets(signatures, self.rows())
        removable = self.removable(documents)[numbers]
        compare = Comparison(self, documents, numbers, signatures)
        found = []
        for place in np.argsort(rank[buckets.rows]).tolist():
            row = int(buckets.rows[place])
            duplicate = compare(row, sorted(buckets.near(place), key=rank.__getitem__)) if removable[row] else None
            if duplicate is None:
                buckets.keep(place)
            else:
                found.append((int(numbers[row]), int(numbers[duplicate[0]]), duplicate[1]))
        for number, original, similarity in sorted(found):
            yield Finding(number, Removed("similar text", f"similarity {similarity:.3f}"), original)

    def rows(self) -> int:
        """Number of hashes of a band: as many as possible so that a pair at the threshold is found with `FOUND`."""
        for rows in range(self.hashes, 1, -1):
            if 1 - (1 - self.threshold**rows) ** (self.hashes // rows) >= FOUND:
                return rows
        return 1


class Buckets:
    """The candidates: documents that have the same hashes as another one in a band of their signatures.

    Those that share a band are in the same bucket of that band. The kept documents of a bucket are a linked list: the
    bucket has the latest, and each one the one before.

    Args:
        signatures: The signatures, (rows, hashes) uint32.
        size: Number of hashes of a band.

    Attributes:
        rows: Row of each candidate, ascending, (candidates,) int64.
    """

    def __init__(self, signatures: np.ndarray, size: int) -> None:
        joined: list[tuple[np.ndarray, np.ndarray]] = []
        for start in range(0, signatures.shape[1] - size + 1, size):
            keys = np.zeros(len(signatures), np.uint64)
            for column in range(start, start + size):
                keys = mixed(keys + signatures[:, column])
            order = np.argsort(keys, kind="stable").astype(np.int32)
            same = keys[order[1:]] == keys[order[:-1]]
            begins = np.concatenate([[True], ~same])
            shared = ~begins | np.concatenate([same, [False]])  # not alone
            joined.append((order[shared], np.cumsum(begins[shared]).astype(np.int32) - 1))
        self.rows = np.unique(np.concatenate([members for members, _ in joined])).astype(np.int64)
        self.buckets = np.full((len(self.rows), len(joined)), -1, np.int32)  # -1: alone in this band
        for band, (members, bucket) in enumerate(joined):
            self.buckets[np.searchsorted(self.rows, members), band] = bucket
        self.latest = [np.full(bucket.max(initial=-1) + 1, -1, np.int32) for _, bucket in joined]
        self.before = np.full_like(self.buckets, -1)

    def near(self, place: int) -> set[int]:
        """The rows of the kept documents that share a bucket with a candidate, given by its index in `rows`."""
        found = set()
        for band, bucket in enumerate(self.buckets[place].tolist()):
            kept = int(self.latest[band][bucket]) if bucket >= 0 else -1
            while kept >= 0:
                found.add(int(self.rows[kept]))
                kept = int(self.before[kept, band])
        return found

    def keep(self, place: int) -> None:
        """Adds a candidate to the kept documents of its buckets."""
        for band, bucket in enumerate(self.buckets[place].tolist()):
            if bucket >= 0:
                self.before[place, band] = self.latest[band][bucket]
                self.latest[band][bucket] = place


class Comparison:
    """Compares a document with kept ones by the true similarity of their texts.

    Args:
        options: The filter.
        documents: The documents.
        numbers: Number of the document of each row.
        signatures: The signatures, (rows, hashes) uint32.
    """

    def __init__(
        self, options: NearDuplicates, documents: Documents, numbers: np.ndarray, signatures: np.ndarray
    ) -> None:
        self.options, self.documents, self.numbers, self.signatures = options, documents, numbers, signatures
        self.cache: OrderedDict[int, tuple[np.ndarray, Any]] = OrderedDict()
        self.size = 0

    def __call__(self, row: int, others: list[int]) -> Optional[tuple[int, float]]:
        """The first of the most similar kept documents that reaches the threshold, with its similarity.

        Args:
            row: The document.
            others: The kept documents, in order of preference.
        """
        if not others:
            return None
        threshold = self.options.threshold
        estimates = (self.signatures[others] == self.signatures[row]).mean(axis=1)
        margin = ERRORS * (threshold * (1 - threshold) / self.options.hashes) ** 0.5
        for position in np.argsort(-estimates, kind="stable").tolist():
            if estimates[position] < threshold - margin:
                return None
            other = others[position]
            (mine, own_numbers), (its, its_numbers) = self.content(row), self.content(other)
            if min(len(mine), len(its)) < threshold * max(len(mine), len(its)) or own_numbers != its_numbers:
                continue
            common = len(np.intersect1d(mine, its, assume_unique=True))
            similarity = common / (len(mine) + len(its) - common)
            if similarity >= threshold:
                return other, similarity
        return None

    def content(self, row: int) -> tuple[np.ndarray, Any]:
        """The shingles of a document and, if duplicates must have the same, its numbers."""
        if row in self.cache:
            self.cache.move_to_end(row)
            return self.cache[row]
        text = self.documents.text(int(self.numbers[row]))
        numbers = digits(text) if self.options.same_numbers else None
        found = self.cache[row] = shingles(word_hashes(text), self.options.shingle), numbers
        self.size += len(found[0])
        while self.size > CACHED and len(self.cache) > 2:
            self.size -= len(self.cache.popitem(last=False)[1][0])
        return found


def digits(text: str) -> list[str]:
    """The numbers in a text: sequences of digits."""
    return "".join(character if character.isdecimal() else " " for character in text).split()


@functools.cache
def _permutations(hashes: int) -> Any:
    from datasketch import MinHash

    return MinHash(hashes).permutations
