"""Data of tagging: sentences with a label for each word.

Labels are plain, such as parts of speech, or mark spans, such as names, by the schemes BIO (B- begins a span, I-
continues it, O is outside) and BIOES (also E-, which ends a span, and S-, a span of a single word). Spans of other
schemes with these prefixes are converted: IOB1 and IO (in which I- can begin a span) to BIO, IOE to BIOES.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lm_lightning.console import printable
from lm_lightning.errors import UserError
from lm_lightning.finetuning.counts import Counts
from lm_lightning.finetuning.data import LabelledData
from lm_lightning.finetuning.examples import Examples
from lm_lightning.finetuning.tables import Row

OUTSIDE = "O"
PREFIXES = {"bio": "BI", "bioes": "BIES"}
MARKED = re.compile(r"[BIES]-.")
LIKE_MARKED = re.compile(r"[BIESLU]([-_].*)?|.+[-_][BIESLU]", re.IGNORECASE)  # in the notations of other projects
BEGINS, ENDS = ("B", "S"), ("E", "S")

# A unit that is scored, such as a span: its type, and its words (first word, word after the last one)
Found = tuple[str, tuple]


def parts(label: str) -> tuple[str, str]:
    """The prefix and the type of a label that marks spans; both are empty for `O`."""
    prefix, _, kind = label.partition("-")
    return (prefix, kind) if label != OUTSIDE else ("", "")


def spans_of(labels: Sequence[str]) -> list[Found]:
    """The spans that labels mark, as in the scripts of CoNLL and seqeval: a different type begins a new span."""
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
    """The labels that mark spans in a sentence with a number of words, by a scheme, `bio` or `bioes`."""
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
        words: The words: a list, a string with a list in JSON or Python syntax, or a string with spaces between words.
        labels: The label of each word, in the same form.
    """

    words: str = "words"
    labels: str = "labels"


class TaggingData(LabelledData):
    """Sentences with a label for each word.

    Args:
        columns: Names of the tables' columns.
        scheme: Scheme of the labels: `plain`, or `bio` or `bioes` for spans; `auto` detects it from the labels.
        options: Options of all labelled data, see `LabelledData`.
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

    def key(self, row: Row) -> str:
        return " ".join(row.words(self.columns.words))

    @property
    def marks_spans(self) -> bool:
        """Whether the labels mark spans, so that only some sequences of labels are legal."""
        return self.scheme != "plain"

    @property
    def kinds(self) -> list[str]:
        """The names for which scores are computed: the types of spans, or the labels."""
        return sorted({parts(label)[1] for label in self.labels} - {""}) if self.marks_spans else self.labels

    def found(self, labels: Sequence[str]) -> list[Found]:
        """The units of a sentence that are scored: its spans, or the labels of its words (except truncated words)."""
        if self.marks_spans:
            return spans_of(labels)
        return [(label, (word, word + 1)) for word, label in enumerate(labels) if label]

    # Labels

    def find_labels(self, found: Mapping[str, str]) -> None:
        if self.labels:
            return
        known = set(found) or set(self.trainer.lightning_module.own_labels())
        if self.scheme == "auto":
            self.scheme = self.detect_scheme(known)
        if self.marks_spans:
            self.check_beginnings(known, bool(found))
        names = set(found)
        if self.marks_spans and found:
            self.check_scheme(found)
            kinds = {parts(label)[1] for label in found} - {""}
            names = {OUTSIDE} | {f"{prefix}-{kind}" for kind in kinds for prefix in PREFIXES[self.scheme]}
        self.labels = self.label_names(names)

    def encoding_options(self, split: str) -> Any:
        return {"scheme": self.scheme}  # that was detected

    def labels_in(self, row: Row) -> list[str]:
        """The labels of a row's words, not yet converted."""
        return self.labels_of(row, self.columns.labels)

    def detect_scheme(self, labels: set[str]) -> Literal["plain", "bio", "bioes"]:
        """The simplest scheme that contains all the labels.

        Raises:
            UserError: If some labels look like labels of spans, but others do not.
        """
        unknown = {label for label in labels if label not in (OUTSIDE, OUTSIDE.lower()) and not MARKED.match(label)}
        if len(unknown) < len(labels) and unknown and all(LIKE_MARKED.fullmatch(label) for label in unknown):
            raise UserError(
                f"labels such as {sorted(unknown)[0]} look like labels of spans, which must be written B-NAME, I-NAME, "
                "E-NAME, S-NAME and O: rename them, or give --data.scheme plain if they do not mark spans"
            )
        marks = {label for label in labels if MARKED.match(label)}
        if not any(label[:2] == "B-" for label in marks) and not (marks and OUTSIDE in labels):
            return "plain"
        if others := sorted(labels - marks - {OUTSIDE}):
            raise UserError(
                f"some labels mark spans (such as {sorted(marks)[0]}) and some do not (such as {others[0]}): fix "
                "them, or give --data.scheme plain if they do not mark spans"
            )
        return "bioes" if any(label[:2] in ("E-", "S-") for label in labels) else "bio"

    def check_beginnings(self, labels: set[str], from_rows: bool) -> None:
        """Reports types of spans without a label B- or S-; refuses them if only the network has such labels."""
        begun = {parts(label)[1] for label in labels if parts(label)[0] in BEGINS}
        never = sorted({parts(label)[1] for label in labels} - begun - {""})
        if never and not from_rows:
            raise UserError(
                f"model.pretrained has a label I-{never[0]}, but no B-{never[0]} that begins such a span: train it "
                f"with `fit` and --data.tables.train{', or score each word with --data.scheme plain' * self.has_scheme}"
            )
        if never:
            names = printable(", ".join(never[:20]))
            self.print(
                f"no label begins with B- or S- for {names}: only I- and E- mark these spans, so adjacent spans are "
                f"merged{'; --data.scheme plain scores each word instead' * self.has_scheme}"
            )

    def check_scheme(self, found: Mapping[str, str]) -> None:
        """Refuses labels that do not belong to the scheme; names the first one."""
        legal = tuple(f"{prefix}-" for prefix in PREFIXES[self.scheme])
        for label, where in found.items():
            if label != OUTSIDE and (not label.startswith(legal) or len(label) < 3):
                remedy = "fix it" + ", or give another --data.scheme" * self.has_scheme
                raise UserError(
                    f"{where}: the label {label!r} does not belong to the scheme {self.scheme} (O, "
                    f"{', '.join(mark + '...' for mark in legal)}): {remedy}"
                )

    def targets(self, row: Row, labels: list[str]) -> torch.Tensor:
        """The ids of labels, (W,) int64; labels of another scheme for spans are converted.

        Raises:
            UserError: If one is unknown.
        """
        if self.marks_spans:
            legal = tuple(f"{prefix}-" for prefix in PREFIXES[self.scheme])
            for label in labels:
                if label != OUTSIDE and not label.startswith(legal):
                    self.label_id(row, label)  # raises the error
            given, labels = labels, encoded(spans_of(labels), len(labels), self.scheme)
            self.counts.add("converted", sum(map(str.__ne__, given, labels)))
        return torch.tensor([self.label_id(row, label) for label in labels])

    # Examples

    def encode(self, split: str, rows: list[Row]) -> list[dict]:
        """Tokenizes the rows of a split, and adds `words` (positions of first tokens) and `targets` (ids of labels)."""
        sentences = [row.words(self.columns.words) for row in rows]
        examples = self.tokenize_words(sentences)
        for example, row, words in zip(examples, rows, sentences):
            if split == "predict":
                example["targets"] = torch.full((len(words),), -100)
            else:
                example["targets"] = self.targets(row, self.labels_of(row, self.columns.labels, len(words)))
        return examples

    def report(self, split: str, examples: Examples, counts: Counts) -> None:
        """Prints also how many labels were converted from another scheme."""
        super().report(split, examples, counts)
        if converted := counts["converted"]:
            example = "I- to B- where a span begins" if self.scheme == "bio" else "I- to E- where a span ends"
            self.print(f"{split}: {converted:,} labels were converted to the scheme {self.scheme} (such as {example})")

    def prediction(self, number: int) -> dict[str, Any]:
        """Additional keys of a prediction, by the number of its example."""
        return {}

    @property
    def info(self) -> dict:
        return super().info | {"scheme": self.scheme}
