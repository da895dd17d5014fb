"""Quality rules of Gopher and C4.

Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from Training Gopher", appendix A1.1; Raffel et
al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", section 2.2. Both were
made for web pages in English; each rule is switched off by null.
"""

import re
from collections.abc import Sequence
from typing import Any, Optional

from lm_lightning.data.filter import Changed, Document, Filter, Removed, Verdict
from lm_lightning.filters.words import SINGLE, WORD, share

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")  # of Gopher
BULLETS = ("•", "‣", "▪", "●", "◦", "⁃", "-", "*", "–")
ELLIPSES = ("...", "…", ". . .")
BLANK_LINE = re.compile(r"\n[^\S\n]*\n\s*")
ENDS = tuple(".!?\"'”’»。！？…」』）)")  # terminal punctuation and what may follow it
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
CITATION = re.compile(r"\[(?:\d{1,4}|edit|citation needed)\]", re.IGNORECASE)
SENTENCE_END = re.compile(r"[.!?]+[\"'”’»)]*(?=\s|$)|[。！？]")


def text_lines(text: str, wrapped: bool) -> list[str]:
    """The lines of a text without blank ones; of wrapped text the paragraphs, as their lines end anywhere."""
    if wrapped:
        return [" ".join(part.split()) for part in BLANK_LINE.split(text) if part.strip()]
    return [line.strip() for line in text.split("\n") if line.strip()]


class GopherQuality(Filter):
    """Removes documents that break a rule of Gopher about length and symbols.

    A character of Chinese or Japanese counts as a word, and the mean length of words is only of the other words, if
    they are at least half of all. The default of `stop_words` is for English only; for other languages, give their most
    frequent words or null. For documents that are paragraphs or lines, lower `min_words` and set `min_stop_words` 0.

    Args:
        min_words: Least number of words.
        max_words: Largest number of words; novels have more.
        min_mean_word: Least mean length of the words in characters.
        max_mean_word: Largest mean length of the words in characters.
        max_hashes: Largest number of `#` for each word.
        max_ellipses: Largest number of ellipses (`...`, `…`) for each word.
        max_bullet_lines: Largest share of the lines that begin with a bullet.
        max_ellipsis_lines: Largest share of the lines that end with an ellipsis.
        min_alphabetic: Least share of the words that contain a letter, of all words between spaces.
        min_stop_words: Least number of different stop words.
        stop_words: The stop words, in lower case. Null: no such rule.
        wrapped: Whether lines are wrapped at a fixed width, as in many books: then paragraphs count as lines.
        options: Arguments of `Filter`.
    """

    def __init__(
        self,
        min_words: Optional[int] = 50,
        max_words: Optional[int] = 100_000,
        min_mean_word: Optional[float] = 3,
        max_mean_word: Optional[float] = 10,
        max_hashes: Optional[float] = 0.1,
        max_ellipses: Optional[float] = 0.1,
        max_bullet_lines: Optional[float] = 0.9,
        max_ellipsis_lines: Optional[float] = 0.3,
        min_alphabetic: Optional[float] = 0.8,
        min_stop_words: int = 2,
        stop_words: Optional[Sequence[str]] = STOP_WORDS,
        wrapped: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.min_words, self.max_words = min_words, max_words
        self.min_mean_word, self.max_mean_word = min_mean_word, max_mean_word
        self.max_hashes, self.max_ellipses = max_hashes, max_ellipses
        self.max_bullet_lines, self.max_ellipsis_lines = max_bullet_lines, max_ellipsis_lines
        self.min_alphabetic, self.min_stop_words = min_alphabetic, min_stop_words
        self.stop_words = list(stop_words or ())
        self.wrapped = wrapped

    def check(self) -> None:
        for option in ("max_bullet_lines", "max_ellipsis_lines", "min_alphabetic"):
            self.require(option, 0, 1)
        for option in ("min_words", "max_words", "min_mean_word", "max_mean_word", "max_hashes", "max_ellipses"):
            self.require(option, 0)
        self.require("min_stop_words", 0)

    def judge(self, document: Document) -> Verdict:
        text = document.text
        words = WORD.findall(text)
        spaced = [word for word in words if not SINGLE.match(word)]
        mean = share(sum(map(len, spaced)), len(spaced)) if len(spaced) * 2 >= len(words) else None
        count = len(words)
        rules = (
            ("min_words", count, "words"),
            ("max_words", count, "words"),
            ("min_mean_word", mean, "characters for each word"),
            ("max_mean_word", mean, "characters for each word"),
            ("max_hashes", share(text.count("#"), count), "hashes for each word"),
            ("max_ellipses", share(sum(map(text.count, ELLIPSES)), count), "ellipses for each word"),
        )
        for option, value, what in rules:
            if removed := beyond(self, option, value, what):
                return removed
        lines = text_lines(text, self.wrapped)
        bullets = share(sum(line.startswith(BULLETS) for line in lines), len(lines))
        ellipses = share(sum(line.endswith(ELLIPSES) for line in lines), len(lines))
        between = text.split()
        alphabetic = share(sum(word.isalpha() or any(map(str.isalpha, word)) for word in between), len(between))
        found = count_stop_words(words, self.stop_words) if self.stop_words and self.min_stop_words else None
        return (
            beyond(self, "max_bullet_lines", bullets, "of the lines begin with a bullet")
            or beyond(self, "max_ellipsis_lines", ellipses, "of the lines end with an ellipsis")
            or beyond(self, "min_alphabetic", alphabetic, "of the words have a letter")
            or beyond(self, "min_stop_words", found, "stop words")
        )


def count_stop_words(words: Sequence[str], stop_words: Sequence[str]) -> int:
    """Number of different stop words among the words of a text."""
    return len(set(stop_words) & {word.lower() for word in words})


def beyond(own: Filter, option: str, value: Optional[float], what: str) -> Optional[Removed]:
    """The verdict about a measured value, if it is beyond the limit `min_...` or `max_...` of a filter.

    Args:
        own: The filter.
        option: The option with the limit.
        value: The value; None if it cannot be measured.
        what: What was measured, to follow the value.
    """
    limit = getattr(own, option)
    if limit is None or value is None:
        return None
    if value < limit if option.startswith("min_") else value > limit:
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
        return Removed(option, f"{shown} {what}, {'less' if option.startswith('min_') else 'more'} than {limit:g}")
    return None


class C4Quality(Filter):
    """Removes lines and documents that break a rule of C4.

    Lines that are not sentences are removed; what is left of a document must have enough sentences. The rules about
    policies, lorem ipsum, Javascript and braces find English web pages only. Lists of offensive words, as in C4, are
    not part of this package.

    Args:
        terminal_punctuation: Whether lines must end with a period, exclamation mark, question mark or quotation mark.
        min_line_words: Least number of words of a line.
        min_sentences: Least number of sentences of a document, after the removal of lines.
        javascript: Whether lines with the word "javascript" are removed.
        policies: Whether lines with phrases such as "privacy policy" are removed.
        lorem_ipsum: Whether documents with "lorem ipsum" are removed.
        braces: Whether documents with a curly bracket are removed, as most are code.
        citations: Whether marks such as [1] and [citation needed] are removed from the text.
        wrapped: Whether lines are wrapped at a fixed width, as in many books: then paragraphs count as lines, which is
            necessary for `terminal_punctuation`.
        options: Arguments of `Filter`.
    """

    def __init__(
        self,
        terminal_punctuation: bool = True,
        min_line_words: Optional[int] = 5,
        min_sentences: Optional[int] = 3,
        javascript: bool = True,
        policies: bool = True,
        lorem_ipsum: bool = True,
        braces: bool = True,
        citations: bool = True,
        wrapped: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.terminal_punctuation, self.min_line_words = terminal_punctuation, min_line_words
        self.min_sentences, self.javascript, self.policies = min_sentences, javascript, policies
        self.lorem_ipsum, self.braces, self.citations, self.wrapped = lorem_ipsum, braces, citations, wrapped

    def check(self) -> None:
        for option in ("min_line_words", "min_sentences"):
            self.require(option, 0)

    def judge(self, document: Document) -> Verdict:
        text = document.text
        if self.lorem_ipsum and "lorem ipsum" in text.lower():
            return Removed("lorem_ipsum", "contains lorem ipsum")
        if self.braces and "{" in text:
            return Removed("braces", "contains a curly bracket")
        counts: dict[str, int] = {}
        if self.citations and "[" in text:
            text, citations = CITATION.subn("", text)
            counts |= {"citations": citations} if citations else {}
        kept, example = [], ""
        for part in BLANK_LINE.split(text) if self.wrapped else text.split("\n"):
            if rule := self.line_rule(part):
                counts[rule] = counts.get(rule, 0) + 1
                example = example or part.strip()[:100]
            else:
                kept.append(part)
        left = ("\n\n" if self.wrapped else "\n").join(kept).strip("\n")
        sentences = len(SENTENCE_END.findall(left))
        if removed := beyond(self, "min_sentences", sentences, "sentences"):
            return removed
        return Changed(left, counts, f"without: {example}" if example else "") if counts else None

    def line_rule(self, line: str) -> str:
        """The rule that a line breaks; empty if it breaks none, as a blank line."""
        line = line.strip()
        if not line:
            return ""
        lower = line.lower()
        if self.javascript and "javascript" in lower:
            return "lines with javascript"
        if self.policies and any(phrase in lower for phrase in POLICIES):
            return "lines with policies"
        if self.terminal_punctuation and not line.endswith(ENDS):
            return "lines without punctuation at the end"
        if self.min_line_words and len(WORD.findall(line)) < self.min_line_words:
            return "short lines"
        return ""
