"""Counts of what is truncated, changed or omitted while rows are converted."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from lm_lightning.data.tokenizer import about_unknown, unknown_warning


class Counts:
    """Numbers by name, each with the first example.

    Args:
        saved: What `saved` has returned.
    """

    def __init__(self, saved: Mapping[str, Any] = {}) -> None:
        self.numbers = Counter({name: number for name, (number, _) in saved.items()})
        self.examples: dict[str, str] = {name: example for name, (_, example) in saved.items()}

    def __getitem__(self, name: str) -> int:
        return self.numbers[name]

    def add(self, name: str, number: int = 1, example: str = "") -> None:
        """Adds a number; keeps the first example that is not empty."""
        self.numbers[name] += number
        if not self.examples.get(name):
            self.examples[name] = example

    def example(self, name: str) -> str:
        """The first example; empty if there is none."""
        return self.examples.get(name, "")

    def saved(self) -> dict[str, Any]:
        """The counts as JSON-serializable data."""
        return {name: [number, self.example(name)] for name, number in self.numbers.items()}


def warnings(split: str, counts: Counts) -> Iterator[str]:
    """A warning if many tokens of a split are unknown."""
    remedy = "use a --model.pretrained whose tokenizer covers such text, or fix --data.tables.encoding"
    example = counts.example("unknown")
    if warning := unknown_warning(split, counts["unknown"], counts["tokens"], example, remedy):
        yield warning


def described(split: str, rows: int, counts: Counts, max_length: int) -> Iterator[str]:
    """Sentences about the size of a split, and what was truncated or changed in it.

    Args:
        split: Its name.
        rows: Number of its examples.
        counts: What was counted.
        max_length: The length to which examples were truncated.
    """
    truncated, tokens, unknown = (counts[name] for name in ("truncated", "tokens", "unknown"))
    yield (
        f"{split}: {rows:,} rows, {tokens:,} tokens"
        + (f", {truncated:,} rows are truncated to {max_length} tokens (data.max_length)" if truncated else "")
        + about_unknown(unknown, tokens)
    )
    yield from warnings(split, counts)
    if words := counts["truncated words"]:
        yield f"{split}: {words:,} of {counts['words']:,} words are truncated, and count as false negatives"
    if stripped := counts["stripped"]:
        yield f"{split}: white space around {stripped:,} labels was removed"
    if respelled := counts["respelled"]:
        yield f"{split}: {respelled:,} labels have several spellings (as 1 and 1.0), which are merged"


def count_phrase(number: int, what: str) -> str:
    """A number of things, as part of a sentence; empty if it is 0."""
    return f", {number:,} {what}" if number else ""
