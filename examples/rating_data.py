"""The data of a task: converts rows of reviews to tokens and targets."""

import torch

from lm_lightning.finetuning.data import LabelledData
from lm_lightning.finetuning.tables import Row


class RatingData(LabelledData):
    """Rows with `text` and, except for `predict`, `stars` from 1 to 5."""

    def key(self, row: Row) -> str:
        return row.text("text")

    def encode(self, split: str, rows: list[Row]) -> list[dict]:
        examples = self.tokenize([row.text("text") for row in rows])
        for example, row in zip(examples, rows):
            stars = float("nan") if split == "predict" else row.number("stars")
            example["targets"] = torch.tensor([float(stars > threshold) for threshold in (1, 2, 3, 4)])
        return examples
