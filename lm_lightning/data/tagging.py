"""Data of tagging: sentences with a label for each word in; tokens out, and the label of each word.

Labels are plain ones, such as parts of speech, or mark spans, such as names, by the schemes BIO (B- begins a span, I-
goes on with it, O is outside) and BIOES (E- ends one, S- is one of a single word).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from lm_lightning.data.labelled import Examples, LabelledData, Row
from lm_lightning.data.words import encode_words
from lm_lightning.errors import UserError

OUTSIDE = "O"
PREFIXES = {"bio": "BI", "bioes": "BIES"}
BEGINS, ENDS = ("B", "S"), ("E", "S")

# What is right or wrong as a whole: a type, and the words (the first, the one after the last).
Found = tuple[str, tuple]


def parts(label: str) -> tuple[str, str]:
    """The prefix and the type of a label that marks spans; `O` has neither."""
    prefix, _, kind = label.partition("-")
    return (prefix, kind) if label != OUTSIDE else ("", "")


def spans_of(labels: Sequence[str]) -> list[Found]:
    """The spans that labels mark, as CoNLL's and seqeval's scripts read them: one of another type begins a new one."""
    spans: list[Found] = []
    start, kind, last = 0, "", ""
    for word, label in enumerate([*labels, OUTSIDE]):
        prefix, own = parts(label)
        if kind and (own != kind or prefix in BEGINS or last in ENDS):
            spans.append((kind, (start, word)))
            kind = ""
        if own and not kind:
            start, kind = word, own
        last = prefix
    return spans


@dataclass
class Columns:
    """Names of the columns.

    Args:
        words: The words: a list of them, a string that spells such a list as JSON or Python writes it, or a string with
            spaces between them.
        labels: The label of each, likewise.
    """

    words: str = "words"
    labels: str = "labels"


class TaggingData(LabelledData):
    """Sentences whose words have a label each.

    Args:
        columns: Names of the tables' columns.
        scheme: Of the labels: `plain` ones, or those of spans, `bio` or `bioes`; `auto` takes what they look like.
        options: Those of all labelled data, see `LabelledData`.
    """

    def __init__(
        self,
        columns: Columns = Columns(),
        scheme: Literal["auto", "plain", "bio", "bioes"] = "auto",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.columns, self.scheme = columns, scheme
        self.mended = 0

    def key(self, row: Row) -> str:
        return " ".join(row.words(self.columns.words))

    @property
    def marks_spans(self) -> bool:
        """Whether the labels mark spans, whose legal sequences are known."""
        return self.scheme != "plain"

    @property
    def kinds(self) -> list[str]:
        """What is counted: the types of spans, or the labels."""
        return sorted({parts(label)[1] for label in self.labels} - {""}) if self.marks_spans else self.labels

    def found(self, labels: Sequence[str]) -> list[Found]:
        """What is right or wrong of a sentence's labels: the spans, or each word's label (none of words cut off)."""
        if self.marks_spans:
            return spans_of(labels)
        return [(label, (word, word + 1)) for word, label in enumerate(labels) if label]

    # Labels

    def find_labels(self, train: list[Row]) -> None:
        if self.labels:
            return
        found = {label for row in train for label in self.labels_in(row)}
        known = found or set(self.trainer.lightning_module.own_labels())
        if self.scheme == "auto":
            self.scheme = self.looks_like(known)
        if self.marks_spans and found:
            self.check_scheme(found, train)
            kinds = {parts(label)[1] for label in found} - {""}
            found = {OUTSIDE} | {f"{prefix}-{kind}" for kind in kinds for prefix in PREFIXES[self.scheme]}
        self.labels = self.label_names(train, found)

    def labels_in(self, row: Row) -> list[str]:
        """The labels of a row's words, as they stand there."""
        return self.labels_of(row, self.columns.labels)

    def looks_like(self, labels: set[str]) -> Literal["plain", "bio", "bioes"]:
        """The scheme of some labels, the simplest that fits.

        Raises:
            UserError: If they look like those of spans, and some do not.
        """
        marks = {label for label in labels if label == OUTSIDE or label[:2] in ("B-", "I-", "E-", "S-")}
        if not any(label[:2] == "B-" for label in labels):
            return "plain"
        if others := sorted(labels - marks):
            raise UserError(
                f"some labels mark spans (such as {sorted(marks)[0]}) and some do not (such as {others[0]}): mend "
                "them, or give --data.scheme plain if each word has a label of its own"
            )
        return "bioes" if any(label[:2] in ("E-", "S-") for label in labels) else "bio"

    def check_scheme(self, labels: set[str], rows: list[Row]) -> None:
        """Refuses labels that are none of the scheme, naming the first."""
        legal = tuple(f"{prefix}-" for prefix in PREFIXES[self.scheme])
        wrong = {label for label in labels if label != OUTSIDE and (not label.startswith(legal) or len(label) < 3)}
        for row in rows if wrong else []:
            for label in self.labels_in(row):
                if label in wrong:
                    raise UserError(
                        f"{row.where}: the label {label!r} is none of the scheme {self.scheme} (O, "
                        f"{', '.join(mark + '...' for mark in legal)}): mend it, or give another --data.scheme"
                    )

    def targets(self, row: Row, labels: list[str]) -> torch.Tensor:
        """The numbers of labels, (W,) int64; those I- that begin a span, as in the scheme IOB1, are read as B-.

        Raises:
            UserError: If one is unknown.
        """
        if self.scheme == "bio":
            before = ["", *(parts(label)[1] for label in labels)]
            begins = [prefix == "I" and kind != last for (prefix, kind), last in zip(map(parts, labels), before)]
            labels = [f"B{label[1:]}" if begin else label for label, begin in zip(labels, begins)]
            self.mended += sum(begins)
        return torch.tensor([self.number(row, label) for label in labels])

    # Examples

    def encode(self, split: str, rows: list[Row]) -> Examples:
        """The rows of a split as tokens, `words` (the place of each word's first token) and `targets` (its label)."""
        sentences = [row.words(self.columns.words) for row in rows]
        examples = encode_words(self.tokenizer, sentences, self.block_size)
        self.mended = 0  # labels I- that begin a span
        for example, row, words in zip(examples, rows, sentences):
            if split == "predict":
                example["targets"] = torch.full((len(words),), -100)
                continue
            labels = self.labels_in(row)
            if len(labels) != len(words):
                raise UserError(f"{row.where}: there are {len(words)} words, but {len(labels)} labels: mend the row")
            example["targets"] = self.targets(row, labels)
        self.report_words(split, examples)
        return Examples(examples, self.seed if split == "train" else None)

    def report_words(self, split: str, examples: list[dict]) -> None:
        """Prints what a split has, how many words of it are cut off, and what was mended."""
        super().report_words(split, examples)
        if self.trainer.is_global_zero and self.mended:
            print(f"{split}: {self.mended:,} labels I- begin a span and are read as B-")

    def prediction(self, number: int) -> dict[str, Any]:
        """What a prediction tells of the example that it is for."""
        return {}

    @property
    def info(self) -> dict:
        return super().info | {"scheme": self.scheme}

    def identity(self) -> dict:
        return super().identity() | {"columns": asdict(self.columns)}
