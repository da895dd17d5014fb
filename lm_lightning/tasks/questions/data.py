"""Data of extractive question answering: converts contexts and questions to windows with the position of the answer.

A context that is too long is split into several overlapping windows, each a row of its own with the full question.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import numpy as np
import torch

from lm_lightning.data.tokenizer import about_unknown
from lm_lightning.errors import UserError
from lm_lightning.finetuning import cells
from lm_lightning.finetuning.counts import Counts, count_phrase, warnings
from lm_lightning.finetuning.data import LabelledData
from lm_lightning.finetuning.examples import Examples
from lm_lightning.finetuning.tables import Row
from lm_lightning.tasks.questions.squad import Squad


@dataclass
class QuestionColumns:
    """Names of the columns; the defaults are the names in SQuAD's JSON files.

    Args:
        id: An id of the question, if it has one.
        context: The text that contains the answer.
        question: The question.
        answers: The correct answers, none or several: a list of `{text, answer_start}`, or `{text: [...], answer_start:
            [...]}` as on the Hub; both may be strings in JSON or Python syntax.
        answer: Instead of `answers`: a single answer, empty if there is none.
        answer_start: The position of this answer in the context, in characters from 0.
    """

    id: str = "id"
    context: str = "context"
    question: str = "question"
    answers: str = "answers"
    answer: Optional[str] = None
    answer_start: str = "answer_start"


class Answer(NamedTuple):
    """A correct answer: its text, and its position in the context, in characters."""

    text: str
    start: int


class Question(NamedTuple):
    """A question of an evaluation.

    Attributes:
        id: Its id, or its number if it has none.
        context: The text that contains the answer.
        answers: The correct answers; empty if the context has none, or if they are unknown.
        text: The question itself.
    """

    id: str | int
    context: str
    answers: list[Answer]
    text: str = ""


class Window(NamedTuple):
    """The origin of the tokens of a window.

    Attributes:
        question: Number of the question in its split.
        offsets: (T, 2) int32, where each token begins and ends in the context, in characters; undefined for tokens that
            are not in the context.
    """

    question: int
    offsets: np.ndarray


class QuestionData(LabelledData):
    """Questions whose answer is a part of a text, as in SQuAD 1.1 and 2.0, whose JSON files can be used directly.

    Args:
        columns: Names of the tables' columns.
        max_length: Number of tokens of a window: the question, a part of the context and special tokens.
        overlap: Number of tokens of the context that a window shares with the previous one.
        max_question: Maximum number of tokens of a question; longer questions are truncated, and their number is
            printed.
        options: Options of all labelled data, see `LabelledData`; `batch_size` is a number of windows.
    """

    formats = (*LabelledData.formats, Squad())
    in_memory = True

    def __init__(
        self,
        columns: QuestionColumns = QuestionColumns(),
        max_length: int = 384,
        overlap: int = 128,
        max_question: int = 64,
        **options: Any,
    ) -> None:
        super().__init__(max_length=max_length, **options)
        self.columns, self.overlap, self.max_question = columns, overlap, max_question
        self.questions: dict[str, list[Question]] = {}  # by split
        self.windows: dict[str, list[Window]] = {}  # by split that is evaluated, in the order of its rows

    def check(self) -> None:
        super().check()
        if self.max_question < 1:
            raise UserError(f"data.max_question is {self.max_question}, but must be 1 or more")

    def key(self, row: Row) -> str:
        return row.text(self.columns.context)

    def answers(self, row: Row) -> list[Answer]:
        """The correct answers of a row.

        Raises:
            UserError: If they cannot be read, or an answer is not at its position in the context.
        """
        columns = self.columns
        found: Any = row.get(columns.answers)
        pairs: list[tuple[Any, Any]]
        if columns.answer is not None:
            if columns.answer not in row:
                row.text(columns.answer)  # raises the error
            pairs = [(row[columns.answer], row.get(columns.answer_start))] if row[columns.answer] else []
        else:
            if columns.answers not in row:
                row.text(columns.answers)
            try:
                found = cells.parsed(found) if isinstance(found, str) else found
                if isinstance(found, dict):
                    pairs = list(zip(found["text"], found["answer_start"], strict=True))
                else:
                    pairs = [(answer["text"], answer["answer_start"]) for answer in found]
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{row.where}: column {columns.answers!r} is {found!r:.60}, but must be a list of "
                    '{"text": ..., "answer_start": ...}, which is empty if the context has no answer'
                ) from error
        answers, context = [], row.text(columns.context)
        for text, place in pairs:
            try:
                start = int(place)
            except (TypeError, ValueError):
                start = -1
            if not isinstance(text, str) or not text.strip() or start < 0 or not context.startswith(text, start):
                first = context.find(str(text))
                raise UserError(
                    f"{row.where}: the answer {text!r:.60} is not at its answer_start {place!r:.20}, which counts "
                    "characters of the context from 0: "
                    f"{f'it is at {first}' if first >= 0 else 'it is not in the context'}; fix or remove the row"
                )
            answers.append(Answer(text, start))
        return answers

    def truncated_question(self, text: str) -> str:
        """A question, truncated to `max_question` tokens."""
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in encoding["offset_mapping"]]
        return text if len(ends) <= self.max_question else text[: ends[self.max_question - 1]]

    def encode(self, split: str, rows: list[Row]) -> list[dict]:
        """The windows of a split.

        Each has `targets`, (2,) int64, the first and last token of the answer, both 0 (the position of [CLS]) if it is
        not in the window; and `context`, (T,) int64, 1 for the tokens of the context.
        """
        room = self.block_size - self.max_question - self.tokenizer.num_special_tokens_to_add(pair=True)
        if not 0 <= self.overlap < room:
            raise UserError(
                f"data.overlap is {self.overlap}, but must be from 0 to {room - 1}, less than the part of the context "
                f"in a window (data.max_length {self.block_size} minus data.max_question {self.max_question} and "
                "special tokens)"
            )
        texts = [row.text(self.columns.question) for row in rows]
        contexts = [row.text(self.columns.context) for row in rows]
        answers: list[list[Answer]] = [[] if split == "predict" else self.answers(row) for row in rows]
        cut = [self.truncated_question(text) for text in texts]
        encoded = self.tokenizer(
            cut,
            contexts,
            truncation="only_second",
            max_length=self.block_size,
            stride=self.overlap,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        numbers, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
        examples = [dict(zip(encoded, values)) for values in zip(*encoded.values())]
        if any(example["input_ids"][0] != self.tokenizer.cls_token_id for example in examples):
            raise UserError("questions need a tokenizer that begins texts with [CLS]: use a network such as BERT")
        windows = [Window(number, np.array(pairs, np.int32)) for number, pairs in zip(numbers, offsets)]
        for number, (example, window) in enumerate(zip(examples, windows)):
            of_context = [sequence == 1 for sequence in encoded.sequence_ids(number)]
            example["context"] = torch.tensor(of_context).long()
            example["targets"] = torch.tensor(
                span(window.offsets, np.array(of_context), answers[window.question])
                if split != "predict"
                else (-100, -100)
            )
        reached = {w.question for w, example in zip(windows, examples) if example["targets"][0] > 0}
        lost = {number for number, right in enumerate(answers) if right} - reached
        for example, window in zip(examples, windows):
            if window.question in lost:  # otherwise the network would learn that it has no answer
                example["targets"] = torch.tensor((-100, -100))
        names = [row.get(self.columns.id) for row in rows]
        ids = [number if name is None else name for number, name in enumerate(names)]
        self.questions[split] = [Question(*values) for values in zip(ids, contexts, answers, texts)]
        if split != "train":
            self.windows[split] = windows
        self.count_tokens(examples, 0, [*cut, *contexts])
        self.counts.add("unanswered", sum(not right for right in answers))
        self.counts.add("truncated questions", sum(map(str.__ne__, texts, cut)))
        self.counts.add("lost", len(lost))
        return examples

    def report(self, split: str, examples: Examples, counts: Counts) -> None:
        self.print(
            f"{split}: {len(self.questions[split]):,} questions"
            + (f", {counts['unanswered']:,} without an answer" if split != "predict" else "")
            + f", {len(examples):,} windows, {counts['tokens']:,} tokens"
            + count_phrase(counts["truncated questions"], f"questions are truncated to {self.max_question} tokens")
            + count_phrase(counts["lost"], "are not used, as their answer is in no window (increase data.overlap)")
            + about_unknown(counts["unknown"], counts["tokens"])
        )
        for warning in warnings(split, counts):
            self.print(warning)


def span(offsets: np.ndarray, of_context: np.ndarray, answers: list[Answer]) -> tuple[int, int]:
    """The first and last token of the first answer in a window; 0 and 0 if the answer is not completely in it.

    Args:
        offsets: As in `Window`.
        of_context: (T,) bool, which tokens are in the context.
        answers: The correct answers; the first one is learned.
    """
    if not answers:
        return 0, 0
    start, end = answers[0].start, answers[0].start + len(answers[0].text)
    inside = of_context & (offsets[:, 1] > start) & (offsets[:, 0] < end)
    places = np.flatnonzero(of_context)
    if not inside.any() or offsets[places[0], 0] > start or offsets[places[-1], 1] < end:
        return 0, 0
    first, last = np.flatnonzero(inside)[[0, -1]]
    return int(first), int(last)
