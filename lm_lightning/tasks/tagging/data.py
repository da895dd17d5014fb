"""Data of tagging: sentences with a label for each word in; tokens out, and the label of each word.

Labels are plain ones, such as parts of speech, or mark spans, such as names, by the schemes BIO (B- begins a span, I-
continues it, O is outside) and BIOES (E- ends one, S- is one of a single word). Spans of other schemes with these
prefixes are converted: IOB1 and IO (I- begins a span, too) to BIO, IOE to BIOES.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lm_lightning.console import printable
from lm_lightning.errors import UserError
from lm_lightning.finetuning.data import LabelledData
from lm_lightning.finetuning.tables import Row

OUTSIDE = "O"
PREFIXES = {"bio": "BI", "bioes": "BIES"}
MARKED = re.compile(r"[BIES]-.")
LIKE_MARKED = re.compile(r"[BIESLU]([-_].*)?|.+[-_][BIESLU]", re.IGNORECASE)  # in the forms of other projects
BEGINS, ENDS = ("B", "S"), ("E", "S")

# What is correct or wrong as a whole: a type, and the words (the first, the one after the last).
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


def encoded(spans: Sequence[Found], words: int, scheme: str) -> list[str]:
    """The labels of as many words that mark spans by a scheme, `bio` or `bioes`."""
    labels = [OUTSIDE] * words
    for kind, (start, end) in spans:
        labels[start:end] = [f"B-{kind}"] + [f"I-{kind}"] * (end - start - 1)
        if scheme == "bioes":
            labels[end - 1] = f"{'S' if end - start == 1 else 'E'}-{kind}"
    return labels


@dataclass
class WordColumns:
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
        scheme: Of the labels: `plain` ones, or those of spans, `bio` or `bioes`; `auto` chooses by what they look like.
        options: Those of all labelled data, see `LabelledData`.
    """

    has_scheme = True  # whether `scheme` is an option

    def __init__(
        self,
        columns: WordColumns = WordColumns(),
        scheme: Literal["auto", "plain", "bio", "bioes"] = "auto",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.columns, self.scheme = columns, scheme
        self.converted = 0  # labels of a split that are of another scheme

    def key(self, row: Row) -> str:
        return " ".join(row.words(self.columns.words))

    @property
    def marks_spans(self) -> bool:
        """Whether the labels mark spans, whose legal sequences are known."""
        return self.scheme != "plain"

    @property
    def kinds(self) -> list[str]:
        """What scores are computed of: the types of spans, or the labels."""
        return sorted({parts(label)[1] for label in self.labels} - {""}) if self.marks_spans else self.labels

    def found(self, labels: Sequence[str]) -> list[Found]:
        """What is correct or wrong of a sentence: the spans, or each word's label (none of truncated words)."""
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
        if self.marks_spans:
            self.check_beginnings(known, bool(found))
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
        unknown = {label for label in labels if label not in (OUTSIDE, OUTSIDE.lower()) and not MARKED.match(label)}
        if len(unknown) < len(labels) and unknown and all(LIKE_MARKED.fullmatch(label) for label in unknown):
            raise UserError(
                f"labels such as {sorted(unknown)[0]} look like those of spans, but these are written B-NAME, I-NAME, "
                "E-NAME, S-NAME and O: rename them, or give --data.scheme plain if each word has a label of its own"
            )
        marks = {label for label in labels if MARKED.match(label)}
        if not any(label[:2] == "B-" for label in marks) and not (marks and OUTSIDE in labels):
            return "plain"
        if others := sorted(labels - marks - {OUTSIDE}):
            raise UserError(
                f"some labels mark spans (such as {sorted(marks)[0]}) and some do not (such as {others[0]}): fix "
                "them, or give --data.scheme plain if each word has a label of its own"
            )
        return "bioes" if any(label[:2] in ("E-", "S-") for label in labels) else "bio"

    def check_beginnings(self, labels: set[str], from_rows: bool) -> None:
        """Reports spans that no label begins; refuses them where the network cannot predict another one, either."""
        begun = {parts(label)[1] for label in labels if parts(label)[0] in BEGINS}
        never = sorted({parts(label)[1] for label in labels} - begun - {""})
        if never and not from_rows:
            raise UserError(
                f"model.pretrained has a label I-{never[0]}, but no B-{never[0]} to begin such a span with: give "
                f"--data.tables.train and fit it{', or --data.scheme plain to score each word' * self.has_scheme}"
            )
        if never:
            names = printable(", ".join(never[:20]))
            self.print(
                f"no label begins with B- or S- for {names}: labels I- and E- alone mark these spans, "
                f"and neighboring ones are one{'; --data.scheme plain scores each word instead' * self.has_scheme}"
            )

    def check_scheme(self, labels: set[str], rows: list[Row]) -> None:
        """Refuses labels that are none of the scheme, naming the first."""
        legal = tuple(f"{prefix}-" for prefix in PREFIXES[self.scheme])
        wrong = {label for label in labels if label != OUTSIDE and (not label.startswith(legal) or len(label) < 3)}
        for row in rows if wrong else []:
            for label in self.labels_in(row):
                if label in wrong:
                    remedy = "fix it" + ", or give another --data.scheme" * self.has_scheme
                    raise UserError(
                        f"{row.where}: the label {label!r} is none of the scheme {self.scheme} (O, "
                        f"{', '.join(mark + '...' for mark in legal)}): {remedy}"
                    )

    def targets(self, row: Row, labels: list[str]) -> torch.Tensor:
        """The ids of labels, (W,) int64; those that mark spans by another scheme are converted.

        Raises:
            UserError: If one is unknown.
        """
        if self.marks_spans:
            legal = tuple(f"{prefix}-" for prefix in PREFIXES[self.scheme])
            for label in labels:
                if label != OUTSIDE and not label.startswith(legal):
                    self.label_id(row, label)  # refuses it
            given, labels = labels, encoded(spans_of(labels), len(labels), self.scheme)
            self.converted += sum(map(str.__ne__, given, labels))
        return torch.tensor([self.label_id(row, label) for label in labels])

    # Examples

    def encode(self, split: str, rows: list[Row]) -> list[dict]:
        """The rows of a split as tokens, `words` (the place of each word's first token) and `targets` (its label)."""
        sentences = [row.words(self.columns.words) for row in rows]
        examples = self.tokenize_words(split, sentences)
        self.converted = 0
        for example, row, words in zip(examples, rows, sentences):
            if split == "predict":
                example["targets"] = torch.full((len(words),), -100)
                continue
            labels = self.labels_in(row)
            if len(labels) != len(words):
                raise UserError(f"{row.where}: there are {len(words)} words, but {len(labels)} labels: fix the row")
            example["targets"] = self.targets(row, labels)
        return examples

    def report_labels(self, split: str) -> None:
        """Prints how many labels of a split were changed, and how many were converted."""
        super().report_labels(split)
        if self.converted:
            example = "I- that begins a span to B-" if self.scheme == "bio" else "I- that ends a span to E-"
            self.print(
                f"{split}: {self.converted:,} labels were converted to the scheme {self.scheme} (such as {example})"
            )

    def prediction(self, number: int) -> dict[str, Any]:
        """What a prediction has beside its labels, by the number of its example."""
        return {}

    @property
    def info(self) -> dict:
        return super().info | {"scheme": self.scheme}
