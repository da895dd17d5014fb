"""What filters get, documents, and what they return, verdicts."""

from typing import Literal, NamedTuple, get_args

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)


class Document(NamedTuple):
    """A document: its number in the order of the corpus, its split (train, validation or test) and its text."""

    number: int
    split: str
    text: str


class Removed(NamedTuple):
    """The verdict that a document is removed.

    Attributes:
        rule: The rule that it breaks, a word or two by which documents are counted.
        reason: Why, with the measured value: `12 words, fewer than 50`.
    """

    rule: str
    reason: str = ""


class Marked(NamedTuple):
    """The verdict that a document is reported, but not removed; attributes as of `Removed`."""

    rule: str
    reason: str = ""


class Changed(NamedTuple):
    """The verdict that a document gets another text.

    Attributes:
        text: The new text.
        counts: Number of changes of each kind.
        example: A part of the new text that shows a change.
    """

    text: str
    counts: dict[str, int]
    example: str = ""


Verdict = Removed | Marked | Changed | None  # None: the document stays as it is
