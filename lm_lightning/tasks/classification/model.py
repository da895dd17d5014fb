"""Classification: predicts a label, several labels, or a number for texts or pairs of texts."""

from functools import partial
from typing import Any, Literal, Optional

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
    MultilabelExactMatch,
    MultilabelF1Score,
    MultilabelStatScores,
)

from lm_lightning.data.order import PADDING
from lm_lightning.errors import UserError
from lm_lightning.finetuning import results
from lm_lightning.finetuning.examples import network_inputs
from lm_lightning.finetuning.metrics import Agreement, mode_of
from lm_lightning.finetuning.mistakes import Mistakes, readable
from lm_lightning.models.metrics import Mode
from lm_lightning.models.module import LanguageModule


class Classification(LanguageModule):
    """A network of `transformers` with a head that classifies texts. Exported models have the names of the labels.

    Args:
        class_weights: Weights of training rows by their labels; labels that are not given have weight 1. `balanced`
            sets the weights so that all labels have the same total weight.
        label_smoothing: Fraction of the target that is distributed over all labels.
        options: Options of all models, see `LanguageModule`.
    """

    auto_class = transformers.AutoModelForSequenceClassification

    @staticmethod
    def main_metric(data: Any) -> str:
        names = {"multiclass": "accuracy", "multilabel": "macro_f1", "regression": "spearman"}
        return names.get(data.get("kind"), "loss")

    def __init__(
        self,
        class_weights: dict[str, float] | Literal["balanced"] | None = None,
        label_smoothing: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.class_weights, self.label_smoothing = class_weights, label_smoothing

    # Network

    def head_settings(self) -> dict[str, Any]:
        data = self.trainer.datamodule
        kinds = {"multiclass": "single_label_classification", "multilabel": "multi_label_classification"}
        if data.kind == "regression":
            return {"num_labels": 1, "problem_type": "regression"}
        return self.label_settings() | {"problem_type": kinds[data.kind]}

    def head_fits(self) -> bool:
        if self.trainer.datamodule.kind == "regression":
            return len(self.own_labels()) == 1
        return super().head_fits()

    def network_made(self) -> None:
        data = self.trainer.datamodule
        self.network.config.pad_token_id = data.tokenizer.pad_token_id  # GPTs classify at the last token before padding
        new = self.pretrained is not None and data.kind == "regression" and not self.head_fits()
        if self.trainer.state.fn == "fit" and new:
            self.start_at_mean()
        self.mistakes = Mistakes()
        self.val_metrics = MetricCollection(self.new_metrics(), compute_groups=False)
        weigh = self.class_weights is not None and self.trainer.state.fn == "fit"  # weights apply only to training
        weights = self.label_weights() if weigh else None
        self.register_buffer("weights", weights, persistent=False)

    def start_at_mean(self) -> None:
        """Makes a new head on pretrained weights predict the mean of the training numbers at the start.

        New networks do not start there, as predicting the mean is a plateau that they would have to leave.
        """
        heads = [m for m in self.network.modules() if isinstance(m, nn.Linear) and m.out_features == 1]
        if heads and heads[-1].bias is not None:
            numbers = [row["targets"] for row in self.trainer.datamodule.examples["train"].rows]
            heads[-1].bias.data.fill_(torch.stack(numbers).mean())

    def label_weights(self) -> Tensor:
        """The weight of each label, (labels,) float32."""
        data = self.trainer.datamodule
        if data.kind != "multiclass":
            raise UserError("model.class_weights is only for data.kind multiclass: omit it")
        if self.class_weights == "balanced":
            numbers = torch.stack([row["targets"] for row in data.examples["train"].rows])
            counts = torch.bincount(numbers, minlength=len(data.labels))
            return counts.sum() / (len(counts) * counts.clamp(min=1))
        unknown = set(self.class_weights or {}) - set(data.labels)
        if unknown:
            raise UserError(f"model.class_weights has {sorted(unknown)}, but the labels are {data.labels}")
        return torch.tensor([float((self.class_weights or {}).get(label, 1.0)) for label in data.labels])  # type: ignore

    def new_metrics(self) -> dict[str, Metric]:
        """The metrics of an evaluation, for rows without padding."""
        data = self.trainer.datamodule
        if data.kind == "regression":
            return {"agreement": Agreement()}
        if data.kind == "multilabel":
            settings = {"num_labels": len(data.labels)}
            return {
                "macro_f1": MultilabelF1Score(**settings),
                "exact_match": MultilabelExactMatch(**settings),
                "counts": MultilabelStatScores(**settings, average=None),
            }
        settings = {"num_classes": len(data.labels)}
        return {
            "accuracy": MulticlassAccuracy(**settings, average="micro"),
            "macro_f1": MulticlassF1Score(**settings),
            "matthews": MulticlassMatthewsCorrCoef(**settings),
            "confusion": MulticlassConfusionMatrix(**settings),
        }

    # Steps

    def logits(self, batch: dict) -> Tensor:
        """(B, labels) float32."""
        return self.network(**network_inputs(batch)).logits.float()

    def losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the losses of rows with targets, and the number or total weight of these rows, () float32 each."""
        if self.trainer.datamodule.kind == "regression":
            counts = ~targets.isnan()
            return ((logits.squeeze(-1) - targets.nan_to_num()).square() * counts).sum(), counts.sum().float()
        if self.trainer.datamodule.kind == "multilabel":
            counts = ~targets.isnan()
            losses = F.binary_cross_entropy_with_logits(logits, targets.nan_to_num(), reduction="none")
            return (losses * counts).sum() / targets.shape[1], counts[:, 0].sum().float()
        weights = self.weights if self.training else None
        smoothing = self.label_smoothing if self.training else 0.0
        loss = F.cross_entropy(logits, targets, weights, ignore_index=-100, reduction="sum", label_smoothing=smoothing)
        counts = (targets != -100).float()
        return loss, (counts if weights is None else counts * weights[targets.clamp(min=0)]).sum()

    def loss(self, batch: dict) -> tuple[Tensor, Tensor]:
        """The loss of a batch, summed over targets, and their number.

        Batches have `input_ids`, `attention_mask` and, for some tokenizers, `token_type_ids`, (B, T) int64, and `id`, B
        ints. `targets` are ids of labels, (B,) int64, -100 for rows without one; several labels, (B, labels) float32
        with 0 and 1, NaN for rows without any; or numbers, (B,) float32, NaN for rows without one.
        """
        return self.losses(self.logits(batch), batch["targets"])

    def distillation_loss(self, batch: dict, teacher: Any, distiller: Any) -> tuple[Tensor, Tensor, Tensor]:
        targets, kind, logits = batch["targets"], self.trainer.datamodule.kind, self.logits(batch)
        with torch.no_grad():
            other = teacher.logits(batch)
        own, count = self.losses(logits, targets)
        if kind == "regression":
            losses, missing = (logits - other).squeeze(-1).square(), targets.isnan()
        elif kind == "multilabel":  # for each label, its logit and 0 as the logit of its absence
            two, other_two = (F.pad(each.unsqueeze(-1), (1, 0)) for each in (logits, other))
            losses, missing = distiller.divergence(two, other_two).mean(1), targets[:, 0].isnan()
        else:
            losses, missing = distiller.divergence(logits, other), targets == -100
            if self.weights is not None:
                losses = losses * self.weights[targets.clamp(min=0)]
        distillation = losses.masked_fill(missing, 0).sum()
        return distiller.mix(own, distillation), count, distillation

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        logits, targets = self.logits(batch), batch["targets"]
        self.val_loss.update(*self.losses(logits, targets))
        # Padding is removed here, as some metrics of torchmetrics count rows that only have `ignore_index`.
        rows = torch.tensor([number != PADDING for number in batch["id"]], device=self.device)
        logits, targets = logits[rows], targets[rows]
        kind = self.trainer.datamodule.kind
        if not len(targets):  # the last batch of a process may contain only padding
            return
        if kind == "regression":
            predicted = logits.squeeze(-1)
            self.val_metrics.update(predicted, targets)
            losses, wrong = (predicted - targets).square(), torch.ones_like(rows[rows])
        elif kind == "multilabel":
            self.val_metrics.update(logits.sigmoid(), targets.long())
            losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
            predicted = (logits.sigmoid() > 0.5).long()
            wrong = (predicted != targets).any(1)
        else:
            self.val_metrics.update(logits, targets)
            losses, predicted = F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1)
            wrong = predicted != targets
        numbers = [number for number in batch["id"] if number != PADDING]
        for row in zip(numbers, losses.tolist(), targets.tolist(), predicted.tolist(), wrong.tolist()):
            if row[-1]:
                self.mistakes.add(*row[:-1])

    def described(self, split: str, row: int, right: Any, predicted: Any) -> dict[str, str]:
        """A row in readable form: its text, the correct label and the prediction."""
        data = self.trainer.datamodule

        def name(value: Any) -> str:
            if data.kind == "regression":
                return f"{value:.4g}"
            if data.kind == "multilabel":
                return ", ".join(label for label, on in zip(data.labels, value) if on)
            return data.labels[value]

        text = readable(data.tokenizer, data.examples[split].rows[row]["input_ids"])
        return {"text": text, "correct": name(right), "predicted": name(predicted)}

    def metric_modes(self) -> dict[str, Optional[Mode]]:
        if self.trainer.datamodule.kind == "regression":
            return {"loss": "min", "pearson": "max", "spearman": "max", "mae": "min"}
        modes: dict[str, Optional[Mode]] = {"loss": "min"}
        modes |= {name: mode_of(metric) for name, metric in self.new_metrics().items()}
        return {name: mode for name, mode in modes.items() if name not in ("confusion", "counts")}

    def metrics(self, loss: Tensor, split: str) -> dict[str, Tensor]:
        """Adds the metrics of the task, and writes the scores of each label and the worst mistakes."""
        self.mistakes.write(self.trainer, self.title(split), partial(self.described, split))
        values = self.val_metrics.compute()
        self.val_metrics.reset()
        confusion, counts = (values.pop(name, None) for name in ("confusion", "counts"))
        labels, title = self.trainer.datamodule.labels, self.title(split)
        if confusion is not None:
            scores = results.label_scores(labels, confusion.diag(), confusion.sum(1), confusion.sum(0))
            results.write(scores, title, self.trainer)
            results.write_confusion(confusion, labels, title, self.trainer)
        elif counts is not None:
            correct, wrong, _, missed, _ = counts.unbind(1)
            results.write(results.label_scores(labels, correct, correct + missed, correct + wrong), title, self.trainer)
        return {"loss": loss} | values

    def predict_step(self, batch: dict, batch_idx: int) -> list[dict]:
        """For each row: its number, `id`; and its `label` with the `scores` of all, its `labels`, or its `score`."""
        data = self.trainer.datamodule
        logits, rows = self.logits(batch), []
        scores = {"multiclass": lambda: logits.softmax(-1), "multilabel": logits.sigmoid, "regression": lambda: logits}[
            data.kind
        ]()
        for number, values in zip(batch["id"], scores.tolist()):
            named = dict(zip(data.labels, values))
            if data.kind == "regression":
                rows.append({"id": number, "score": values[0]})
            elif data.kind == "multilabel":
                rows.append({"id": number, "labels": [k for k, v in named.items() if v > 0.5], "scores": named})
            else:
                label = max(named, key=lambda name: named[name])
                rows.append({"id": number, "label": label, "score": named[label], "scores": named})
        return rows
