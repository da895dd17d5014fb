"""The kinds of classification: one label, several labels or a number for each text.

In all methods, B is the number of texts and L the number of labels, or 1 for numbers.
"""

from typing import Any, ClassVar

import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
    MultilabelExactMatch,
    MultilabelF1Score,
    MultilabelStatScores,
)

from lm_lightning.finetuning import results
from lm_lightning.finetuning.metrics import Agreement
from lm_lightning.models.metrics import Mode


class Kind:
    """What is predicted for a text, and how predictions are learned, measured and written.

    Args:
        labels: Names of the labels; empty for numbers.

    Attributes:
        problem_type: Its name in the configs of `transformers`.
        main_metric: The metric that decides which checkpoint is the best.
        modes: The direction in which each metric is better.
    """

    problem_type: ClassVar[str]
    main_metric: ClassVar[str]
    modes: ClassVar[dict[str, Mode]]

    def __init__(self, labels: list[str]) -> None:
        self.labels = labels

    def metrics(self) -> dict[str, Metric]:
        """The metrics of an evaluation, which are updated with `predicted` and the targets of the same texts."""
        raise NotImplementedError

    def missing(self, targets: Tensor) -> Tensor:
        """Which texts have no target, (B,) bool."""
        raise NotImplementedError

    def losses(self, logits: Tensor, targets: Tensor, **settings: Any) -> Tensor:
        """The loss of each text, (B,) float32; 0 for texts without a target.

        Args:
            logits: (B, L) float32.
            targets: As in the batches of `Classification.loss`.
            settings: Other arguments of `cross_entropy`; only for single labels.
        """
        raise NotImplementedError

    def divergences(self, logits: Tensor, teacher: Tensor, distiller: Any) -> Tensor:
        """The distillation loss of each text, (B,) float32, from its logits and those of the teacher, (B, L) each."""
        raise NotImplementedError

    def scores(self, logits: Tensor) -> Tensor:
        """The scores that `predict` writes, (B, L) float32."""
        raise NotImplementedError

    def predicted(self, logits: Tensor) -> Tensor:
        """The predictions, in the form of the targets."""
        raise NotImplementedError

    def name(self, value: Any) -> str:
        """A target or a prediction in readable form; `value` is its row of a tensor, as a number or a list."""
        raise NotImplementedError

    def row(self, scores: list[float]) -> dict[str, Any]:
        """What `predict` writes for a text with these scores."""
        raise NotImplementedError

    def write_results(self, values: dict[str, Tensor], title: str, trainer: Trainer) -> None:
        """Writes the results of each label, and removes them from `values`, those of the metrics; numbers have none."""


class Multiclass(Kind):
    """A single label. Targets are ids of labels, (B,) int64, -100 for missing ones."""

    problem_type = "single_label_classification"
    main_metric = "accuracy"
    modes = {"accuracy": "max", "macro_f1": "max", "matthews": "max"}

    def metrics(self) -> dict[str, Metric]:
        settings = {"num_classes": len(self.labels)}
        return {
            "accuracy": MulticlassAccuracy(**settings, average="micro"),
            "macro_f1": MulticlassF1Score(**settings),
            "matthews": MulticlassMatthewsCorrCoef(**settings),
            "confusion": MulticlassConfusionMatrix(**settings),
        }

    def missing(self, targets: Tensor) -> Tensor:
        return targets == -100

    def losses(self, logits: Tensor, targets: Tensor, **settings: Any) -> Tensor:
        return F.cross_entropy(logits, targets, ignore_index=-100, reduction="none", **settings)

    def divergences(self, logits: Tensor, teacher: Tensor, distiller: Any) -> Tensor:
        return distiller.divergence(logits, teacher)

    def scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def predicted(self, logits: Tensor) -> Tensor:
        return logits.argmax(-1)

    def name(self, value: int) -> str:
        return self.labels[value]

    def row(self, scores: list[float]) -> dict[str, Any]:
        named = dict(zip(self.labels, scores))
        label = max(named, key=lambda name: named[name])
        return {"label": label, "score": named[label], "scores": named}

    def write_results(self, values: dict[str, Tensor], title: str, trainer: Trainer) -> None:
        confusion = values.pop("confusion")
        scores = results.label_scores(self.labels, confusion.diag(), confusion.sum(1), confusion.sum(0))
        results.write(scores, title, trainer)
        results.write_confusion(confusion, self.labels, title, trainer)


class Multilabel(Kind):
    """Any number of labels. Targets are (B, L) float32, 1 for the labels of a text; NaN for texts without a target."""

    problem_type = "multi_label_classification"
    main_metric = "macro_f1"
    modes = {"macro_f1": "max", "exact_match": "max"}

    def metrics(self) -> dict[str, Metric]:
        settings = {"num_labels": len(self.labels)}
        return {
            "macro_f1": MultilabelF1Score(**settings),
            "exact_match": MultilabelExactMatch(**settings),
            "counts": MultilabelStatScores(**settings, average=None),
        }

    def missing(self, targets: Tensor) -> Tensor:
        return targets[:, 0].isnan()

    def losses(self, logits: Tensor, targets: Tensor, **settings: Any) -> Tensor:
        losses = F.binary_cross_entropy_with_logits(logits, targets.nan_to_num(), reduction="none")
        return losses.mean(1).masked_fill(self.missing(targets), 0)

    def divergences(self, logits: Tensor, teacher: Tensor, distiller: Any) -> Tensor:
        # For each label, its logit and 0 as the logit of its absence
        both, teacher_both = (F.pad(each.unsqueeze(-1), (1, 0)) for each in (logits, teacher))
        return distiller.divergence(both, teacher_both).mean(1)

    def scores(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def predicted(self, logits: Tensor) -> Tensor:
        return (self.scores(logits) > 0.5).long()

    def name(self, value: list[float]) -> str:
        return ", ".join(label for label, on in zip(self.labels, value) if on)

    def row(self, scores: list[float]) -> dict[str, Any]:
        named = dict(zip(self.labels, scores))
        return {"labels": [label for label, score in named.items() if score > 0.5], "scores": named}

    def write_results(self, values: dict[str, Tensor], title: str, trainer: Trainer) -> None:
        correct, wrong, _, missed, _ = values.pop("counts").unbind(1)
        results.write(results.label_scores(self.labels, correct, correct + missed, correct + wrong), title, trainer)


class Regression(Kind):
    """A number. Targets are (B,) float32, NaN for missing ones."""

    problem_type = "regression"
    main_metric = "spearman"
    modes = {"pearson": "max", "spearman": "max", "mae": "min"}

    def metrics(self) -> dict[str, Metric]:
        return {"agreement": Agreement()}

    def missing(self, targets: Tensor) -> Tensor:
        return targets.isnan()

    def losses(self, logits: Tensor, targets: Tensor, **settings: Any) -> Tensor:
        return (self.predicted(logits) - targets.nan_to_num()).square().masked_fill(self.missing(targets), 0)

    def divergences(self, logits: Tensor, teacher: Tensor, distiller: Any) -> Tensor:
        return (self.predicted(logits) - self.predicted(teacher)).square()

    def scores(self, logits: Tensor) -> Tensor:
        return logits

    def predicted(self, logits: Tensor) -> Tensor:
        return logits.squeeze(-1)

    def name(self, value: float) -> str:
        return f"{value:.4g}"

    def row(self, scores: list[float]) -> dict[str, Any]:
        return {"score": scores[0]}


KINDS: dict[str, type[Kind]] = {"multiclass": Multiclass, "multilabel": Multilabel, "regression": Regression}
