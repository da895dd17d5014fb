"""Data of semantic roles: sentences with frames, each a predicate with its arguments.

Each frame is an example: its sentence with the predicate between two marks. With the marks, any network can distinguish
the frames of a sentence (Zhou and Chen, An Improved Baseline for Sentence-level Relation Extraction, 2021, also mark
with punctuation), and the exported model works in the `token-classification` pipeline of `transformers`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lm_lightning.errors import UserError
from lm_lightning.finetuning.tables import Row
from lm_lightning.finetuning.words import encode_words
from lm_lightning.tasks.tagging.data import OUTSIDE, Found, TaggingData, spans_of

PREDICATE = "V"
CONTINUED = "C-"


@dataclass
class RoleColumns:
    """Names of the columns.

    Args:
        words: The words of the sentence: a list, or a string with spaces between words.
        frames: A list of frames, each an object with the keys below. Empty if each row is a frame.
        predicate: The number of the predicate's word, from 0.
        spans: The arguments as [first word, last word, label], from 0.
        labels: Instead of `spans`: the label of each word, in the scheme BIO.
    """

    words: str = "words"
    frames: str = "frames"
    predicate: str = "predicate"
    spans: str = "spans"
    labels: str = "labels"


class RoleData(TaggingData):
    """Sentences with the arguments of predicates.

    Args:
        columns: Names of the tables' columns.
        mark: Text that is inserted before and after the predicate.
        options: Options of all labelled data, see `LabelledData`.
    """

    columns: RoleColumns  # type: ignore[assignment]
    has_scheme = False
    in_memory = True

    def __init__(self, columns: RoleColumns = RoleColumns(), mark: str = "*", **options: Any) -> None:
        super().__init__(scheme="bio", **options)
        self.columns, self.mark = columns, mark
        self.frame_words: dict[str, list[tuple[int, int]]] = {}  # row and predicate's word of each example, by split

    @property
    def kinds(self) -> list[str]:
        """The names for which scores are computed: the types of arguments, without the predicate and prefix C-."""
        return sorted({kind.removeprefix(CONTINUED) for kind in super().kinds} - {PREDICATE})

    def found(self, labels: Sequence[str]) -> list[Found]:
        """The arguments, as in the script of CoNLL-2005: C-X continues the last X before it.

        A C-X without a preceding X is an X. An argument is correct if all its parts are. The predicate does not count.
        """
        arguments: dict[str, tuple] = {}  # the last argument of each type
        done: list[Found] = []
        for kind, place in spans_of(labels):
            own = kind.removeprefix(CONTINUED)
            if own != kind and own in arguments:
                arguments[own] += place
                continue
            if own in arguments:
                done.append((own, arguments[own]))
            arguments[own] = place
        return [(kind, place) for kind, place in [*done, *arguments.items()] if kind != PREDICATE]

    def frames(self, row: Row) -> list[Row]:
        """The frames of a row."""
        if not self.columns.frames:
            return [row]
        frames = row.entries(self.columns.frames)
        if frames is None or not all(isinstance(frame, dict) for frame in frames):
            raise UserError(
                f"{row.where}: column {self.columns.frames!r} is not a list of frames such as "
                f'{{"{self.columns.predicate}": 3, "{self.columns.spans}": [[0, 2, "ARG0"]]}}: fix the row or, if each '
                "row is a frame, give --data.columns.frames ''"
            )
        return [Row(frame, f"{row.where}, frame {number}") for number, frame in enumerate(frames, start=1)]

    def predicate(self, frame: Row, words: list[str]) -> int:
        """The word of a frame's predicate."""
        value = frame.value(self.columns.predicate)
        number = int(value) if isinstance(value, str) and value.isdigit() else value
        if not isinstance(number, int) or not 0 <= number < len(words):
            raise UserError(
                f"{frame.where}: the predicate is {value!r:.40}, but must be the number of a word, 0 to "
                f"{len(words) - 1}: fix the row"
            )
        return number

    def find_labels(self, found: Mapping[str, str]) -> None:
        super().find_labels(found)
        if not self.kinds:
            raise UserError("the labels of the frames mark no arguments, only predicates (V): use data with arguments")

    def labels_in(self, row: Row) -> list[str]:
        """The labels of all frames of a row."""
        words = row.words(self.columns.words)
        return [label for frame in self.frames(row) for label in self.labels_of_frame(frame, words)]

    def labels_of_frame(self, frame: Row, words: list[str]) -> list[str]:
        """The label of each word of a frame, from its spans or its labels."""
        if self.columns.spans not in frame:
            return self.labels_of(frame, self.columns.labels, len(words))
        spans = frame.entries(self.columns.spans)
        labels = [OUTSIDE] * len(words)
        for span in [frame[self.columns.spans]] if spans is None else spans:
            try:
                start, last, kind = span
                fits = 0 <= start <= last < len(words) and isinstance(kind, str) and bool(kind)
            except (TypeError, ValueError):
                fits = False
            if not fits:
                raise UserError(
                    f"{frame.where}: {span!r:.60} is not a span of the words 0 to {len(words) - 1}, such as "
                    "[0, 2, 'ARG0']: fix the row"
                )
            if any(label != OUTSIDE for label in labels[start : last + 1]):
                raise UserError(f"{frame.where}: the span {span} overlaps another one: fix the row")
            labels[start : last + 1] = [f"B-{kind}"] + [f"I-{kind}"] * (last - start)
        return labels

    def encode(self, split: str, rows: list[Row]) -> list[dict]:
        """Tokenizes the frames of a split, and adds `words` (positions of first tokens), `targets` (ids of labels)."""
        sentences, targets, self.frame_words[split] = [], [], []
        for number, row in enumerate(rows):
            words = row.words(self.columns.words)
            for frame in self.frames(row):
                predicate = self.predicate(frame, words)
                sentences.append([*words[:predicate], self.mark, words[predicate], self.mark, *words[predicate + 1 :]])
                self.frame_words[split].append((number, predicate))
                if split == "predict":
                    targets.append(torch.full((len(words),), -100))
                else:
                    targets.append(self.targets(frame, self.labels_of_frame(frame, words)))
        if not sentences:
            raise UserError(
                f"the rows of the {split} split have no frames: give the name of the column with --data.columns.frames"
            )
        examples = encode_words(self.tokenizer, sentences, self.block_size)
        for example, target, (_, predicate) in zip(examples, targets, self.frame_words[split]):
            unmarked = [word for word in range(len(example["words"])) if word not in (predicate, predicate + 2)]
            example["words"], example["targets"] = example["words"][unmarked], target
        self.count_words(examples, sentences)
        return examples

    def prediction(self, number: int) -> dict[str, Any]:
        """The row number and the predicate of a prediction."""
        row, predicate = self.frame_words["predict"][number]
        return {"row": row, "predicate": predicate}
