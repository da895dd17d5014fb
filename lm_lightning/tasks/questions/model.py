"""Extractive question answering: finds the best span for each question over all windows of its context."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable
from difflib import SequenceMatcher
from functools import partial
from typing import Any, Literal, NamedTuple, Optional

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lm_lightning.data.order import PADDING
from lm_lightning.errors import UserError
from lm_lightning.finetuning import results
from lm_lightning.finetuning.examples import network_inputs
from lm_lightning.finetuning.mistakes import Mistakes
from lm_lightning.models.metrics import Mode
from lm_lightning.models.module import LanguageModule
from lm_lightning.tasks.questions.data import Question, Window

PUNCTUATION = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")  # as in CMRC 2018's script


class Span(NamedTuple):
    """The best answer that a network finds to a question.

    Attributes:
        text: A slice of the context.
        start: Its start in the context, in characters.
        end: Its end in the context, in characters.
        score: The sum of the logits of its start and end.
        no_answer: The score of [CLS], the lowest one over the windows; high if no window contains an answer.
    """

    text: str
    start: int
    end: int
    score: float
    no_answer: float


class AnswerScore(NamedTuple):
    """Scores of a subset of the questions, as in the official scripts, but as fractions, not percentages."""

    questions: str
    exact_match: float
    f1: float
    rows: int


class Spans(Metric):
    """The best spans of all windows, over all batches and processes."""

    full_state_update = False
    places: list[Tensor]
    scores: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("places", [], dist_reduce_fx="cat")
        self.add_state("scores", [], dist_reduce_fx="cat")

    def update(self, places: Tensor, scores: Tensor) -> None:
        """Adds the spans of a batch: `places`, (B, 3), the number of the window and the span, see `best_spans`."""
        self.places.append(places)
        self.scores.append(scores)

    def compute(self) -> tuple[list[list[int]], list[list[float]]]:
        """The spans of all windows."""
        return dim_zero_cat(self.places).tolist(), dim_zero_cat(self.scores).tolist()


class QuestionAnswering(LanguageModule):
    """A network of `transformers` that finds where the answer to a question begins and ends in a text.

    Args:
        max_answer: Maximum number of tokens of an answer.
        threshold: No answer is predicted if the score for no answer exceeds the score of the best span by more than
            this value; evaluations report the best threshold. null: there always is an answer, as in SQuAD 1.1.
        scoring: Definition of exact match and F1: `squad`, by words, or `cmrc`, by Chinese characters.
        options: Options of all models, see `LanguageModule`.
    """

    auto_class = transformers.AutoModelForQuestionAnswering

    @staticmethod
    def main_metric(data: Any) -> str:
        return "f1"

    def __init__(
        self,
        max_answer: int = 30,
        threshold: Optional[float] = 0.0,
        scoring: Literal["squad", "cmrc"] = "squad",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if max_answer < 1:
            raise UserError(f"model.max_answer is {max_answer}, but must be 1 or more")
        self.max_answer, self.threshold = max_answer, threshold
        self.score: Callable[[str, list[str]], tuple[float, float]] = {"squad": squad, "cmrc": cmrc}[scoring]
        self.spans = Spans()

    def head_settings(self) -> dict[str, Any]:
        return {"num_labels": 2}  # a start and an end

    def head_fits(self) -> bool:
        return True  # no other task has tensors of these names

    # Steps

    def logits(self, batch: dict) -> Tensor:
        """Logits of start and end, (2, B, T) float32."""
        output = self.network(**network_inputs(batch))
        return torch.stack([output.start_logits, output.end_logits]).float()

    def of_places(self, logits: Tensor, batch: dict) -> Tensor:
        """Replaces logits by the lowest number where an answer cannot begin or end.

        Otherwise, the loss of a window would depend on its padding, and thus on the other windows of the batch.
        """
        allowed = batch["context"] == 1
        allowed[:, 0] = True
        return logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)

    def losses(self, logits: Tensor, batch: dict) -> tuple[Tensor, Tensor]:
        """The mean loss of start and end, summed over the windows with targets, and the number of these windows."""
        logits = self.of_places(logits, batch)
        loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].T.flatten(), ignore_index=-100, reduction="sum")
        return loss / 2, (batch["targets"][:, 0] != -100).sum()

    def loss(self, batch: dict) -> tuple[Tensor, Tensor]:
        """The loss of a batch, summed over targets, and their number.

        Batches have `input_ids`, `attention_mask` and, for some tokenizers, `token_type_ids`, (B, T) int64; `id`, B
        ints; `context`, (B, T) int64, 1 for the tokens that can be in an answer; and `targets`, (B, 2) int64, the first
        and last token of the answer, -100 for windows without targets.
        """
        return self.losses(self.logits(batch), batch)

    def distillation_loss(self, batch: dict, teacher: Any, distiller: Any) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.logits(batch)
        with torch.no_grad():
            other = self.of_places(teacher.logits(batch), batch)
        own, count = self.losses(logits, batch)
        losses = distiller.divergence(self.of_places(logits, batch), other).mean(0)  # mean of start and end
        distillation = losses.masked_fill(batch["targets"][:, 0] == -100, 0).sum()
        return distiller.mix(own, distillation), count, distillation

    def found(self, logits: Tensor, batch: dict) -> tuple[Tensor, Tensor]:
        """The best span of each window: its number, first and last token, (B, 3) int64, and scores, (B, 2) float32."""
        places, scores = best_spans(logits, batch["context"] == 1, self.max_answer)
        return torch.cat([torch.tensor(batch["id"], device=places.device)[:, None], places], 1), scores

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        logits = self.logits(batch)
        self.val_loss.update(*self.losses(logits, batch))
        self.spans.update(*self.found(logits, batch))

    def metric_modes(self) -> dict[str, Optional[Mode]]:
        modes: dict[str, Optional[Mode]] = {"loss": "min", "exact_match": "max", "f1": "max"}
        questions = self.trainer.datamodule.questions.get("validation", [])
        if len({bool(question.answers) for question in questions}) > 1:
            modes |= {"answerable_f1": "max", "unanswerable_f1": "max", "best_f1": "max", "best_threshold": None}
        return modes

    def metrics(self, loss: Tensor, split: str) -> dict[str, Tensor]:
        """Adds exact match and F1 over the questions that were evaluated, and writes the scores of subsets of them."""
        spans = self.joined(split, *self.spans.compute())
        self.spans.reset()
        questions = self.trainer.datamodule.questions[split]
        predicted = {number: self.answer(span) for number, span in spans.items()}
        scores = {n: self.score(predicted[n], [a.text for a in questions[n].answers]) for n in spans}
        with_answer = [n for n in spans if questions[n].answers]
        without = [n for n in spans if not questions[n].answers]
        parts = {"all": list(spans), "with an answer": with_answer, "without an answer": without}
        table = [
            AnswerScore(
                name,
                sum(scores[n][0] for n in part) / len(part),
                sum(scores[n][1] for n in part) / len(part),
                len(part),
            )
            for name, part in parts.items()
            if part
        ]
        values = {"exact_match": table[0].exact_match, "f1": table[0].f1}
        if with_answer and without:
            values |= {"answerable_f1": table[1].f1, "unanswerable_f1": table[2].f1}
            always = {n: self.score(spans[n].text, [a.text for a in questions[n].answers])[1] for n in with_answer}
            margins = {n: span.no_answer - span.score for n, span in spans.items()}
            best, threshold = best_threshold(margins, always)
            values |= {"best_f1": best, "best_threshold": threshold}
        mistakes = Mistakes()
        for number in spans if self.trainer.is_global_zero else ():
            if not scores[number][0]:
                mistakes.add(number, 1 - scores[number][1], None, predicted[number])
        mistakes.write(self.trainer, self.title(split), partial(described, questions))
        results.write(table, self.title(split), self.trainer)
        return {"loss": loss} | {name: torch.tensor(value, device=loss.device) for name, value in values.items()}

    def joined(self, split: str, places: list[list[int]], scores: list[list[float]]) -> dict[int, Span]:
        """The best span of each question, by its number, from the spans of windows in any order."""
        data = self.trainer.datamodule
        return join(data.questions[split], data.windows[split], places, scores)

    def answer(self, span: Span) -> str:
        """The text of a span; empty if it is more likely that there is no answer."""
        none = self.threshold is not None and span.no_answer - span.score > self.threshold
        return "" if none else span.text

    def predict_step(self, batch: dict, batch_idx: int) -> list[dict]:
        """The best span of each window; `join_predictions` converts them to answers."""
        places, scores = self.found(self.logits(batch), batch)
        rows = zip(places.tolist(), scores.tolist())
        return [{"id": row[0][0], "place": row[0], "scores": row[1]} for row in rows]

    def join_predictions(self, rows: list[dict]) -> list[dict]:
        """For each question its `id`, `row`, `answer`, `score`, `start`, `end` and `no_answer_score`.

        `id` is the id of the question or, if it has none, its number; `row` is always its number. The slice of the
        context from `start` to `end` is the best span, even if `answer` is empty because no answer is predicted.
        """
        spans = self.joined("predict", [row["place"] for row in rows], [row["scores"] for row in rows])
        questions = self.trainer.datamodule.questions["predict"]
        return [
            {
                **{"id": questions[number].id, "row": number, "answer": self.answer(span), "score": span.score},
                **{"start": span.start, "end": span.end, "no_answer_score": span.no_answer},
            }
            for number, span in sorted(spans.items())
        ]


def described(questions: list[Question], number: int, _: None, predicted: str) -> dict[str, str]:
    """A question in readable form, with the context around its first answer."""
    question = questions[number]
    start = question.answers[0].start if question.answers else max(question.context.find(predicted), 0)
    context = question.context[max(0, start - 200) : start + 400]
    right = " / ".join(dict.fromkeys(answer.text for answer in question.answers))
    text, nothing = f"{question.text} | {context}", "(no answer)"
    return {"text": text, "correct": right or nothing, "predicted": predicted or nothing}


def best_spans(logits: Tensor, of_context: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """The best span within the context of each window, exactly.

    Args:
        logits: Logits of start and end, (2, B, T) float32.
        of_context: Which tokens can be in an answer, (B, T) bool.
        longest: Maximum number of tokens of an answer.

    Returns:
        First and last token of the span, (B, 2) int64; the score of the span and the score of no answer, (B, 2)
        float32.
    """
    start, end = logits.masked_fill(~of_context, torch.finfo(logits.dtype).min / 4)
    ends = F.pad(end, (0, longest - 1), value=torch.finfo(logits.dtype).min / 4).unfold(1, longest, 1)
    score, place = (start[:, :, None] + ends).flatten(1).max(1)
    first = place // longest
    return torch.stack([first, first + place % longest], 1), torch.stack([score, logits[:, :, 0].sum(0)], 1)


def join(
    questions: list[Question], windows: list[Window], places: list[list[int]], scores: list[list[float]]
) -> dict[int, Span]:
    """The best span of each question over its windows.

    Args:
        questions: Questions of a split.
        windows: Windows of the same split.
        places: Number, first and last token of each window, in any order; numbers may occur twice or be `PADDING`.
        scores: Scores of the window's best span and of no answer.
    """
    spans: dict[int, Span] = {}
    for (number, first, last), (score, no_answer) in sorted(zip(places, scores)):
        if number == PADDING:
            continue
        question, offsets = windows[number]
        found = spans.get(question)
        no_answer = min(no_answer, found.no_answer) if found else no_answer
        if found and found.score >= score:
            spans[question] = found._replace(no_answer=no_answer)
            continue
        context, start, end = questions[question].context, int(offsets[first, 0]), int(offsets[last, 1])
        while end < len(context) and unicodedata.category(context[end])[0] == "M":
            end += 1  # a combining mark of the last letter, which tokenizers may have removed
        spans[question] = Span(context[start:end], start, end, score, no_answer)
    return spans


def best_threshold(margins: dict[int, float], f1: dict[int, float]) -> tuple[float, float]:
    """The best F1 that any threshold gives, and this threshold, as in SQuAD 2.0's script.

    Args:
        margins: For each question, the score of no answer minus the score of the best span.
        f1: F1 of the best span, for each question that has an answer.
    """
    current = best = float(len(margins) - len(f1))  # no answer is predicted for any question
    threshold = 0.0
    for number in sorted(margins, key=lambda n: margins[n]):
        current += f1.get(number, -1.0)
        if current > best:
            best, threshold = current, margins[number]
    return best / len(margins), threshold


def normalized(text: str) -> str:
    """Text without case, punctuation, English articles and superfluous white space, as in SQuAD's scripts."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def squad(predicted: str, answers: list[str]) -> tuple[float, float]:
    """Exact match and F1 by words, the best over the correct answers, as in evaluate-v2.0.py of SQuAD.

    If all correct answers and the predicted one contain words other than articles, evaluate-v1.1.py gives the same.

    Args:
        predicted: The predicted answer; empty for no answer.
        answers: The correct answers; empty if the question has none.
    """
    words = normalized(predicted).split()
    exact = f1 = 0.0
    for right in [gold for answer in answers if (gold := normalized(answer).split())] or [[]]:
        common = sum((Counter(right) & Counter(words)).values())
        exact = max(exact, float(right == words))
        f1 = max(f1, 2 * common / (len(right) + len(words)) if right and words else float(right == words))
    return exact, f1


def unpunctuated(text: str) -> str:
    """Text without case and punctuation, as in CMRC's script."""
    return "".join(character for character in text.lower().strip() if character not in PUNCTUATION)


def segments(text: str) -> list[str]:
    """Chinese characters, and the words between them.

    CMRC's script, which uses NLTK's tokenizer, also splits these words at marks such as commas.
    """
    return re.sub("([\u4e00-\u9fa5])", r" \1 ", unpunctuated(text)).split()


def cmrc(predicted: str, answers: list[str]) -> tuple[float, float]:
    """Exact match and F1 by Chinese characters, the best over the correct answers, as in CMRC 2018's script.

    F1 is computed from the longest common substring.

    Args:
        predicted: The predicted answer; empty for no answer.
        answers: The correct answers; empty if the question has none.
    """
    characters = segments(predicted)
    exact = f1 = 0.0
    for answer in answers or [""]:
        right = segments(answer)
        common = SequenceMatcher(None, right, characters, autojunk=False).find_longest_match().size
        same = float(unpunctuated(answer) == unpunctuated(predicted))
        exact = max(exact, same)
        f1 = max(f1, 2 * common / (len(right) + len(characters)) if right and characters else same)
    return exact, f1
