"""The model of a task: its head has a logit each for more than 1, 2, 3 and 4 stars; positive ones add a star."""

from typing import Any, Optional

import torch
import transformers
from torch import Tensor

from lm_lightning.finetuning.examples import network_inputs
from lm_lightning.models.metrics import Mode, Ratio
from lm_lightning.models.module import LanguageModule


class Rating(LanguageModule):
    """A network with a logit for each threshold. Its metric is the mean absolute error in stars."""

    auto_class = transformers.AutoModelForSequenceClassification

    @staticmethod
    def main_metric(data: Any) -> str:
        return "mae"

    def head_settings(self) -> dict[str, Any]:
        return {"num_labels": 4, "problem_type": "multi_label_classification"}

    def head_fits(self) -> bool:
        return len(self.own_labels()) == 4

    def network_made(self) -> None:
        self.error = Ratio()  # sums over batches and processes

    def logits(self, batch: dict) -> Tensor:
        """(B, 4) float32."""
        return self.network(**network_inputs(batch)).logits.float()

    def loss(self, batch: dict) -> tuple[Tensor, Tensor]:
        targets, counts = batch["targets"].nan_to_num(), ~batch["targets"].isnan()  # rows that only pad a batch are NaN
        losses = torch.nn.functional.binary_cross_entropy_with_logits(self.logits(batch), targets, reduction="none")
        return (losses * counts).sum() / 4, counts[:, 0].sum()

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        counts = ~batch["targets"][:, 0].isnan()
        wrong = (self.logits(batch) > 0).sum(1) - batch["targets"].nan_to_num().sum(1)
        self.error.update((wrong.abs() * counts).sum(), counts.sum())

    def metric_modes(self) -> dict[str, Optional[Mode]]:
        return {"loss": "min", "mae": "min"}

    def metrics(self, loss: Tensor, split: str) -> dict[str, Tensor]:
        mae = self.error.compute()
        self.error.reset()
        return {"loss": loss, "mae": mae}

    def predict_step(self, batch: dict, batch_idx: int) -> list[dict]:
        stars = 1 + (self.logits(batch) > 0).sum(1)
        return [{"id": number, "stars": value} for number, value in zip(batch["id"], stars.tolist())]
