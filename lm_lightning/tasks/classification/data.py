"""Data of classification: converts rows with a text, or a pair of texts, and a label to batches."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Optional

import torch

from lm_lightning.errors import UserError
from lm_lightning.finetuning import cells
from lm_lightning.finetuning.data import LabelledData
from lm_lightning.finetuning.tables import Row


@dataclass
class TextColumns:
    """Names of the columns.

    Args:
        text: The text.
        pair: The second text, for pairs of texts.
        label: The label, or the number. For `multilabel`: a list of labels, a string with such a list in JSON or Python
            syntax, or a string with `separator` between the labels.
    """

    text: str = "text"
    pair: Optional[str] = None
    label: str = "label"


class ClassificationData(LabelledData):
    """Texts or pairs of texts, each with a label, several labels, or a number.

    Args:
        columns: Names of the tables' columns.
        kind: What is predicted: one label (`multiclass`), any number of labels (`multilabel`), or a number
            (`regression`).
        separator: Separator between several labels in a string.
        options: Options of all labelled data, see `LabelledData`.
    """

    def __init__(
        self,
        columns: TextColumns = TextColumns(),
        kind: Literal["multiclass", "multilabel", "regression"] = "multiclass",
        separator: str = ",",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not separator:
            raise UserError("data.separator is empty, but must have at least one character")
        self.columns, self.kind, self.separator = columns, kind, separator

    def key(self, row: Row) -> str:
        return "\n".join(row.text(column) for column in (self.columns.text, self.columns.pair) if column is not None)

    def labels_in(self, row: Row) -> list[str]:
        return self.names(row)

    @property
    def has_labels(self) -> bool:
        return self.kind != "regression"

    def find_labels(self, found: Mapping[str, str]) -> None:
        if self.kind != "regression" and not self.labels:
            self.labels = self.label_names(found)

    def encode(self, split: str, rows: list[Row]) -> list[dict]:
        texts = [row.text(self.columns.text) for row in rows]
        pairs = None if self.columns.pair is None else [row.text(self.columns.pair) for row in rows]
        examples = self.tokenize(texts, pairs)
        for example, row in zip(examples, rows):
            example["targets"] = torch.tensor(-100) if split == "predict" else self.target(row)
        return examples

    def names(self, row: Row) -> list[str]:
        """The labels of a row, without surrounding white space.

        Raises:
            UserError: If a row has no label although it must have one, or several labels although it must have one.
        """
        column, multiclass = self.columns.label, self.kind == "multiclass"
        value, values = row.value(column), row.entries(column, strict=not multiclass)
        if multiclass:
            if values is not None or isinstance(value, dict):
                raise UserError(
                    f"{row.where}: column {column!r} is {value!r:.40}, but must be a single label: give --data.kind "
                    "multilabel, or fix the row"
                )
            values = [value]
        elif values is None:
            values = value.split(self.separator) if isinstance(value, str) else [value]
        names = [cells.label(item) for item in values]
        if multiclass or not isinstance(value, str):  # white space next to separators is normal
            self.counts.add("stripped", sum(map(cells.has_outer_space, values)))
        if multiclass and not names[0]:
            raise UserError(f"{row.where}: the row has no label in column {column!r}: fix or remove it")
        if any(isinstance(item, (list, dict)) for item in values):
            raise UserError(
                f"{row.where}: column {column!r} is {value!r:.40}, but must be a list of labels: fix the row"
            )
        return [name for name in names if name]

    def target(self, row: Row) -> torch.Tensor:
        """The target of a row: () int64, the id of its label; (labels,) float32, 1 for its labels and 0 for others; or
        () float32, its number.
        """
        if self.kind == "regression":
            return torch.tensor(row.number(self.columns.label))
        ids = [self.label_id(row, name) for name in self.names(row)]
        if self.kind == "multiclass":
            return torch.tensor(ids[0])
        return torch.tensor([float(number in ids) for number in range(len(self.labels))])
