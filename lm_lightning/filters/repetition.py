"""Repetition rules of Gopher: Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from Training
Gopher", table A1."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np

from lm_lightning.data.filter import Document, Filter, Removed, Verdict
from lm_lightning.filters.quality import BLANK_LINE, beyond, text_lines
from lm_lightning.filters.words import WORD, ngrams, share, word_numbers


class GopherRepetition(Filter):
    """Removes documents that repeat themselves: table A1 of Gopher. No rule depends on the language.

    Sequences of words are compared without upper case and punctuation. The shares of characters count the letters and
    digits of words. In documents of a few words any repetition is a large share, so n-grams are not counted in
    documents with fewer than `min_words` words.

    Args:
        max_duplicate_lines: Largest share of the lines that are equal to an earlier line.
        max_duplicate_paragraphs: Largest share of the paragraphs that are equal to an earlier paragraph.
        max_duplicate_line_characters: Largest share of the characters in lines that are equal to an earlier line.
        max_duplicate_paragraph_characters: Largest share of the characters in such paragraphs.
        max_top: Largest share of the characters in the most frequent sequence of 2, 3, ... words.
        max_duplicate_ngrams: Largest share of the characters in sequences of 5, 6, ... words that occurred before.
        min_words: Least number of words for the last two.
        wrapped: Whether lines are wrapped at a fixed width, as in many books: then paragraphs count as lines.
        options: Arguments of `Filter`.
    """

    def __init__(
        self,
        max_duplicate_lines: Optional[float] = 0.3,
        max_duplicate_paragraphs: Optional[float] = 0.3,
        max_duplicate_line_characters: Optional[float] = 0.2,
        max_duplicate_paragraph_characters: Optional[float] = 0.2,
        max_top: Optional[Sequence[float]] = (0.2, 0.18, 0.16),
        max_duplicate_ngrams: Optional[Sequence[float]] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.1),
        min_words: int = 50,
        wrapped: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.max_duplicate_lines, self.max_duplicate_paragraphs = max_duplicate_lines, max_duplicate_paragraphs
        self.max_duplicate_line_characters = max_duplicate_line_characters
        self.max_duplicate_paragraph_characters = max_duplicate_paragraph_characters
        self.max_top, self.max_duplicate_ngrams = list(max_top or ()), list(max_duplicate_ngrams or ())
        self.min_words, self.wrapped = min_words, wrapped

    def check(self) -> None:
        for option in vars(self):
            if option.startswith("max_duplicate_") and option != "max_duplicate_ngrams":
                self.require(option, 0, 1)
        self.require("min_words", 0)

    def judge(self, document: Document) -> Verdict:
        text = document.text
        paragraphs = [part.strip() for part in BLANK_LINE.split(text) if part.strip()]
        for kind, parts in (("line", text_lines(text, self.wrapped)), ("paragraph", paragraphs)):
            number, characters = repeated(parts)
            if removed := beyond(self, f"max_duplicate_{kind}s", number, f"of the {kind}s are repeated"):
                return removed
            option = f"max_duplicate_{kind}_characters"
            if removed := beyond(self, option, characters, f"of the characters are in repeated {kind}s"):
                return removed
        words = WORD.findall(text.lower())
        if len(words) < max(self.min_words, 1):
            return None
        return self.judge_ngrams(words)

    def judge_ngrams(self, words: Sequence[str]) -> Verdict:
        """The verdict about the sequences of words."""
        numbers, lengths = word_numbers(words), np.fromiter(map(len, words), np.int64, len(words))
        total = int(lengths.sum())
        for size, limit in enumerate(self.max_top, 2):
            value = top_share(numbers, lengths, size) / total
            if value > limit:
                what = f"{value:.3g} of the characters are in the most frequent {size}-gram, more than {limit:g}"
                return Removed(f"top {size}-gram", what)
        for size, limit in enumerate(self.max_duplicate_ngrams, 5):
            value = covered(ngrams(numbers, size), lengths, size) / total
            if value > limit:
                what = f"{value:.3g} of the characters are in repeated {size}-grams, more than {limit:g}"
                return Removed(f"duplicate {size}-grams", what)
            if value <= min(self.max_duplicate_ngrams[size - 5 :]):
                break  # longer sequences cover no more characters
        return None


def repeated(parts: Sequence[str]) -> tuple[float, float]:
    """The share of the parts of a text that are equal to an earlier one, and that of their characters."""
    counts = Counter(parts)
    extra = [(part, count - 1) for part, count in counts.items() if count > 1]
    number, characters = sum(count for _, count in extra), sum(len(part) * count for part, count in extra)
    return share(number, len(parts)), share(characters, sum(map(len, parts)))


def top_share(numbers: np.ndarray, lengths: np.ndarray, size: int) -> int:
    """Number of characters in the most frequent sequence of `size` words, if there is one that occurs twice.

    Args:
        numbers: A number for each word, equal for equal words, (words,) uint64.
        lengths: Length of each word, (words,) int64.
        size: Number of words.
    """
    hashes = ngrams(numbers, size)
    if not len(hashes):
        return 0
    _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    most = counts.max()
    if most < 2:
        return 0
    own = np.convolve(lengths, np.ones(size, np.int64), "valid")[first]
    return int((own[counts == most] * most).max())


def covered(hashes: np.ndarray, lengths: np.ndarray, size: int) -> int:
    """Number of characters in sequences of `size` words that occurred before, each character counted once."""
    if not len(hashes):
        return 0
    _, first = np.unique(hashes, return_index=True)
    again = np.ones(len(hashes), np.int64)
    again[first] = 0
    inside = np.convolve(again, np.ones(size, np.int64)) > 0
    return int(lengths[inside].sum())
