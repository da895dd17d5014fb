"""Classification: predicts a label, several labels, or a number for texts or pairs of texts."""

from functools import partial
from typing import Any, Literal, Optional

import torch
import transformers
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lm_lightning.data.order import PADDING
from lm_lightning.errors import UserError
from lm_lightning.finetuning.examples import network_inputs
from lm_lightning.finetuning.mistakes import Mistakes, readable
from lm_lightning.finetuning.store import column
from lm_lightning.models.metrics import Mode
from lm_lightning.models.module import LanguageModule
from lm_lightning.tasks.classification.kinds import KINDS, Kind


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
        kind = KINDS.get(data.get("kind"))
        return "loss" if kind is None else kind.main_metric

    def __init__(
        self,
        class_weights: dict[str, float] | Literal["balanced"] | None = None,
        label_smoothing: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not 0 <= label_smoothing < 1:
            raise UserError(f"model.label_smoothing is {label_smoothing}, but must be from 0 to below 1")
        self.class_weights, self.label_smoothing = class_weights, label_smoothing

    @property
    def kind(self) -> Kind:
        """What is predicted."""
        data = self.trainer.datamodule
        return KINDS[data.kind](data.labels)

    # Network

    def head_settings(self) -> dict[str, Any]:
        settings = {"num_labels": 1} if self.trainer.datamodule.kind == "regression" else self.label_settings()
        return settings | {"problem_type": self.kind.problem_type}

    def head_fits(self) -> bool:
        if self.trainer.datamodule.kind == "regression":
            return len(self.own_labels()) == 1
        return super().head_fits()

    def network_made(self) -> None:
        data, training = self.trainer.datamodule, self.trainer.state.fn == "fit"
        self.network.config.pad_token_id = data.tokenizer.pad_token_id  # GPTs classify at the last token before padding
        if training and self.pretrained is not None and data.kind == "regression" and not self.head_fits():
            self.start_at_mean()
        self.mistakes = Mistakes()
        self.val_metrics = MetricCollection(self.kind.metrics(), compute_groups=False)
        for name in ("class_weights", "label_smoothing"):  # both apply only to training
            if training and data.kind != "multiclass" and getattr(self, name):
                raise UserError(f"model.{name} is only for data.kind multiclass: omit it")
        weights = self.label_weights() if training and self.class_weights is not None else None
        self.register_buffer("weights", weights, persistent=False)

    def start_at_mean(self) -> None:
        """Makes a new head on pretrained weights predict the mean of the training numbers at the start.

        New networks do not start there, as predicting the mean is a plateau that they would have to leave.
        """
        heads = [m for m in self.network.modules() if isinstance(m, nn.Linear) and m.out_features == 1]
        if heads and heads[-1].bias is not None:
            numbers = column(self.trainer.datamodule.examples["train"].rows, "targets")
            heads[-1].bias.data.fill_(numbers.mean())

    def label_weights(self) -> Tensor:
        """The weight of each label, (labels,) float32."""
        data = self.trainer.datamodule
        if self.class_weights == "balanced":
            numbers = column(data.examples["train"].rows, "targets")
            counts = torch.bincount(numbers, minlength=len(data.labels))
            return counts.sum() / (len(counts) * counts.clamp(min=1))
        unknown = set(self.class_weights or {}) - set(data.labels)
        if unknown:
            raise UserError(f"model.class_weights has {sorted(unknown)}, but the labels are {data.labels}")
        return torch.tensor([float((self.class_weights or {}).get(label, 1.0)) for label in data.labels])  # type: ignore

    # Steps

    def logits(self, batch: dict) -> Tensor:
        """(B, labels) float32."""
        return self.network(**network_inputs(batch)).logits.float()

    def losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the losses of rows with targets, and the number or total weight of these rows, () float32 each."""
        settings = {"weight": self.weights, "label_smoothing": self.label_smoothing} if self.training else {}
        return self.kind.losses(logits, targets, **settings).sum(), self.row_weights(targets).sum()

    def row_weights(self, targets: Tensor) -> Tensor:
        """The weight of each row, (B,) float32; 0 for rows without a target."""
        present = (~self.kind.missing(targets)).float()
        return present if self.weights is None or not self.training else present * self.weights[targets.clamp(min=0)]

    def loss(self, batch: dict) -> tuple[Tensor, Tensor]:
        """The loss of a batch, summed over targets, and their number.

        Batches have `input_ids`, `attention_mask` and, for some tokenizers, `token_type_ids`, (B, T) int64, and `id`, B
        ints. `targets` are ids of labels, (B,) int64, -100 for rows without one; several labels, (B, labels) float32
        with 0 and 1, NaN for rows without any; or numbers, (B,) float32, NaN for rows without one.
        """
        return self.losses(self.logits(batch), batch["targets"])

    def distillation_loss(self, batch: dict, teacher: Any, distiller: Any) -> tuple[Tensor, Tensor, Tensor]:
        logits, targets = self.logits(batch), batch["targets"]
        with torch.no_grad():
            other = teacher.logits(batch)
        own, count = self.losses(logits, targets)
        distillation = (self.kind.divergences(logits, other, distiller) * self.row_weights(targets)).sum()
        return distiller.mix(own, distillation), count, distillation

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        logits, targets, kind = self.logits(batch), batch["targets"], self.kind
        self.val_loss.update(*self.losses(logits, targets))
        # Padding is removed here, as some metrics of torchmetrics count rows that only have `ignore_index`.
        rows = torch.tensor([number != PADDING for number in batch["id"]], device=self.device)
        logits, targets = logits[rows], targets[rows]
        if not len(targets):  # the last batch of a process may contain only padding
            return
        predicted = kind.predicted(logits)
        self.val_metrics.update(predicted, targets.to(predicted.dtype))
        wrong = (predicted != targets).view(len(targets), -1).any(1)
        numbers = [number for number in batch["id"] if number != PADDING]
        losses = kind.losses(logits, targets)
        for row in zip(numbers, losses.tolist(), targets.tolist(), predicted.tolist(), wrong.tolist()):
            if row[-1]:
                self.mistakes.add(*row[:-1])

    def described(self, split: str, row: int, right: Any, predicted: Any) -> dict[str, str]:
        """A row in readable form: its text, the correct label and the prediction."""
        data, kind = self.trainer.datamodule, self.kind
        text = readable(data.tokenizer, data.examples[split].rows[row]["input_ids"])
        return {"text": text, "correct": kind.name(right), "predicted": kind.name(predicted)}

    def metric_modes(self) -> dict[str, Optional[Mode]]:
        return {"loss": "min", **self.kind.modes}

    def metrics(self, loss: Tensor, split: str) -> dict[str, Tensor]:
        """Adds the metrics of the task, and writes the scores of each label and the worst mistakes."""
        self.mistakes.write(self.trainer, self.title(split), partial(self.described, split))
        values = self.val_metrics.compute()
        self.val_metrics.reset()
        self.kind.write_results(values, self.title(split), self.trainer)
        return {"loss": loss} | values

    def predict_step(self, batch: dict, batch_idx: int) -> list[dict]:
        """For each row: its number, `id`; and its `label` with the `scores` of all, its `labels`, or its `score`."""
        scores = self.kind.scores(self.logits(batch)).tolist()
        return [{"id": number} | self.kind.row(values) for number, values in zip(batch["id"], scores)]
