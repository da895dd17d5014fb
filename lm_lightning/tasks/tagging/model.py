"""Tagging: predicts the label of each word, and the spans that labels mark, such as names or semantic roles."""

from functools import partial
from typing import Any, Optional

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from lm_lightning.finetuning import results
from lm_lightning.finetuning.examples import network_inputs
from lm_lightning.finetuning.metrics import Counts
from lm_lightning.finetuning.mistakes import Mistakes, readable, words_of
from lm_lightning.finetuning.words import TRUNCATED
from lm_lightning.models.metrics import Mode
from lm_lightning.models.module import LanguageModule
from lm_lightning.tasks.tagging.data import OUTSIDE, Found, spans_of
from lm_lightning.tasks.tagging.viterbi import decode, legal


class Tagging(LanguageModule):
    """A network of `transformers` with a head over each token; the first token of each word predicts its label.

    If labels mark spans, the best legal sequence of labels is predicted, for example without an I- that does not follow
    its B-.
    """

    auto_class = transformers.AutoModelForTokenClassification

    @staticmethod
    def main_metric(data: Any) -> str:
        return "f1"

    # Network

    def head_settings(self) -> dict[str, Any]:
        return self.label_settings()

    def network_made(self) -> None:
        data = self.trainer.datamodule
        self.rules = legal(data.labels, data.scheme) if data.marks_spans else None
        self.counts, self.mistakes = Counts(data.kinds), Mistakes()
        self.confusion = MulticlassConfusionMatrix(len(data.labels), ignore_index=-100)

    # Steps

    def logits(self, batch: dict) -> Tensor:
        """Logits of each word, (B, W, labels) float32; undefined for truncated words."""
        places = batch["words"].clamp(min=0).unsqueeze(-1)
        logits = self.network(**network_inputs(batch)).logits
        return logits.gather(1, places.expand(-1, -1, logits.shape[-1])).float()

    def losses(self, logits: Tensor, batch: dict) -> tuple[Tensor, Tensor]:
        """The sum of the losses of words that have a label and are not truncated, and their number, () each."""
        targets = batch["targets"].masked_fill(batch["words"] == TRUNCATED, -100)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), (targets != -100).sum()

    def loss(self, batch: dict) -> tuple[Tensor, Tensor]:
        """The loss of a batch, summed over targets, and their number.

        Batches have `input_ids`, `attention_mask` and, for some tokenizers, `token_type_ids`, (B, T) int64; `id`, B
        ints; `words`, (B, W) int64, the positions of the words' first tokens, -1 for truncated words, -100 for padding;
        and `targets`, (B, W) int64, the ids of the words' labels, -100 for words without a label.
        """
        return self.losses(self.logits(batch), batch)

    def distillation_loss(self, batch: dict, teacher: Any, distiller: Any) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.logits(batch)
        with torch.no_grad():
            other = teacher.logits(batch)
        own, count = self.losses(logits, batch)
        missing = (batch["targets"] == -100) | (batch["words"] < 0)
        distillation = distiller.divergence(logits, other).masked_fill(missing, 0).sum()
        return distiller.mix(own, distillation), count, distillation

    def decode_predictions(self, logits: Tensor, batch: dict) -> Tensor:
        """The predicted label of each word, (B, W) int64; if labels mark spans, the best legal sequence of labels.

        -100 for padding; truncated words are `O` if labels mark spans, otherwise also -100.
        """
        words = batch["words"]
        if self.rules is None:
            return logits.argmax(-1).masked_fill(words < 0, -100)
        scores = logits.log_softmax(-1)
        outside = torch.full_like(scores[0, 0], -torch.inf)
        outside[self.trainer.datamodule.labels.index(OUTSIDE)] = 0
        scores = torch.where((words == TRUNCATED).unsqueeze(-1), outside, scores)
        return decode(scores, (words != -100).sum(1), self.rules)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        data, logits, targets = self.trainer.datamodule, self.logits(batch), batch["targets"]
        self.val_loss.update(*self.losses(logits, batch))
        predicted = self.decode_predictions(logits, batch)
        self.confusion.update(predicted.clamp(min=0), targets.masked_fill(predicted < 0, -100))
        of_words = targets.masked_fill(batch["words"] == TRUNCATED, -100)
        losses = F.cross_entropy(logits.transpose(1, 2), of_words, reduction="none").sum(1).tolist()
        for number, own, gold, loss in zip(batch["id"], predicted.tolist(), targets.tolist(), losses):
            words = [n for n, label in enumerate(gold) if label != -100]
            gold_labels = [data.labels[gold[n]] for n in words]
            own_labels = [data.labels[own[n]] if own[n] >= 0 else "" for n in words]
            right, found = data.found(gold_labels), data.found(own_labels)
            self.counts.update(right, found)
            if set(right) != set(found):
                self.mistakes.add(number, loss, right, found)

    def described(self, split: str, row: int, right: list[Found], predicted: list[Found]) -> dict[str, str]:
        """A row in readable form: its text, and the correct and predicted labels or spans that differ."""
        data = self.trainer.datamodule
        example = data.examples[split].rows[row]
        words = words_of(data.tokenizer, example)

        def names(found: list[Found], others: list[Found]) -> str:
            """The labels with their words; several parts of a span are joined."""
            named = []
            for kind, place in found:
                if (kind, place) not in others:
                    parts = zip(place[::2], place[1::2])
                    named.append(f"{kind}: {' … '.join(' '.join(words[start:end]) for start, end in parts)}")
            return "; ".join(named)

        text = readable(data.tokenizer, example["input_ids"])
        return {"text": text, "correct": names(right, predicted), "predicted": names(predicted, right)}

    def metric_modes(self) -> dict[str, Optional[Mode]]:
        names = ("precision", "recall") if self.trainer.datamodule.marks_spans else ("accuracy",)
        return {"loss": "min", **dict.fromkeys(("f1", "macro_f1", *names), "max")}

    def metrics(self, loss: Tensor, split: str) -> dict[str, Tensor]:
        """Adds the metrics of the task, and writes the scores of each label or type of spans."""
        data, counts, confusion = self.trainer.datamodule, self.counts.compute(), self.confusion.compute()
        self.counts.reset()
        self.confusion.reset()
        self.mistakes.write(self.trainer, self.title(split), partial(self.described, split))
        title = self.title(split)
        results.write(results.label_scores(data.kinds, *counts), title, self.trainer)
        results.write_confusion(confusion, data.labels, title, self.trainer)
        each = 2 * counts[0] / (counts[1] + counts[2])  # NaN for labels that do not occur
        right, gold, predicted = counts.sum(1)
        values = {"loss": loss, "f1": 2 * right / (gold + predicted).clamp(min=1), "macro_f1": each.nanmean()}
        if data.marks_spans:
            return values | {"precision": right / predicted.clamp(min=1), "recall": right / gold.clamp(min=1)}
        return values | {"accuracy": right / gold.clamp(min=1)}

    def predict_step(self, batch: dict, batch_idx: int) -> list[dict]:
        """For each row: its number, `id`, and the label of each word and its probability, None for truncated words.

        If labels mark spans, also `spans`: [first word, last word, label].
        """
        data, logits = self.trainer.datamodule, self.logits(batch)
        predicted = self.decode_predictions(logits, batch)
        scores = logits.softmax(-1).gather(2, predicted.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        rows = []
        for number, places, own, probability in zip(
            batch["id"], batch["words"].tolist(), predicted.tolist(), scores.tolist()
        ):
            words = [n for n, place in enumerate(places) if place != -100]
            row = {"id": number} | data.prediction(number)
            row["labels"] = [data.labels[own[n]] if places[n] != TRUNCATED else None for n in words]
            row["scores"] = [probability[n] if places[n] != TRUNCATED else None for n in words]
            if data.marks_spans:
                spans = spans_of([label or OUTSIDE for label in row["labels"]])
                row["spans"] = [[start, end - 1, kind] for kind, (start, end) in spans]
            rows.append(row)
        return rows
