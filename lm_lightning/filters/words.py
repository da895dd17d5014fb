"""Words of a text and hashes of sequences of words, for filters that compare texts."""

import hashlib
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

# Characters of languages that are written without spaces are words of their own: kana, Chinese characters, Thai, Lao,
# Burmese, Khmer.
ALONE = (
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\U00020000-\U0003ffff"
)
WORD = re.compile(rf"[{ALONE}]|[^\W_{ALONE}]+(?:['’][^\W_{ALONE}]+)*")  # with contractions: don't
SINGLE = re.compile(f"[{ALONE}]")
MULTIPLIER = 0x9E3779B97F4A7C15  # odd, with bits in no pattern; it distinguishes the order of the words
MOST_WORDS = 1 << 20  # different words whose hashes are remembered


class WordHashes(dict):
    """64-bit hashes of words, computed when first needed."""

    def __missing__(self, word: str) -> int:
        if len(self) >= MOST_WORDS:
            self.clear()
        digest = hashlib.blake2b(word.encode(errors="replace"), digest_size=8).digest()
        value = self[word] = int.from_bytes(digest, "little")
        return value


_hashes = WordHashes()


def word_hashes(text: str) -> np.ndarray:
    """64-bit hashes of the words of a text without upper case and punctuation, (words,) uint64."""
    return word_numbers(WORD.findall(text.lower()))


def word_numbers(words: Sequence[str]) -> np.ndarray:
    """64-bit hashes of words, (words,) uint64."""
    return np.fromiter(map(_hashes.__getitem__, words), np.uint64, len(words))


def mixed(values: np.ndarray) -> np.ndarray:
    """Spreads the bits of 64-bit values (the finalizer of MurmurHash3); different values stay different."""
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        values = (values ^ (values >> np.uint64(33))) * np.uint64(multiplier)
    return values ^ (values >> np.uint64(33))


def ngrams(words: np.ndarray, size: int) -> np.ndarray:
    """Hashes of all sequences of `size` words, (words - size + 1,) uint64; empty if there are fewer words."""
    count = max(0, len(words) - size + 1)
    result = np.zeros(count, np.uint64)
    for start in range(size if count else 0):
        result = result * np.uint64(MULTIPLIER) + words[start : start + count]
    return mixed(result)


def shingles(words: np.ndarray, size: int) -> np.ndarray:
    """The set of hashes of all sequences of `size` words, sorted, (n,) uint64.

    The text is padded, so that each word is in `size` sequences: a changed first or last word counts as any other.
    """
    padding = np.arange(1, size, dtype=np.uint64)
    return np.unique(ngrams(np.concatenate([padding, words, padding]), size))


def normalized(text: str, normalize: Literal["none", "spaces", "words"]) -> str:
    """A text without differences that do not count: in white space, or in everything but lower-case words."""
    if normalize == "none":
        return text
    return " ".join(text.split() if normalize == "spaces" else WORD.findall(text.lower()))


def share(part: float, total: float) -> float:
    """A share, which is 0 if the total is 0."""
    return part / total if total else 0.0


def longest_first(sizes: np.ndarray, splits: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """The order in which similar documents are preferred, which does not depend on the order of the corpus.

    Those of the test and validation splits come first, so that their duplicates are removed from the training split;
    then longer ones, then by a hash of the text, (documents,) int64.
    """
    return np.lexsort((hashes, -sizes, -splits.astype(np.int64)))


def text_hash(text: str) -> int:
    """A 63-bit hash of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest(), "little") >> 1
