"""Data of classification: rows with a text, or a pair of texts, and a label in; batches of tokens and targets out."""

import itertools
from dataclasses import asdict, dataclass
from typing import Any, Literal, Optional

import torch

from lm_lightning.data import cells
from lm_lightning.errors import UserError
from lm_lightning.finetuning.data import Examples, LabelledData, Row


@dataclass
class Columns:
    """Names of the columns.

    Args:
        text: The text.
        pair: The second text of a pair, if there are pairs.
        label: The label; of `several`, a list of them, a string that spells such a list as JSON or Python writes it,
            or a string in which `separator` stands between them.
    """

    text: str = "text"
    pair: Optional[str] = None
    label: str = "label"


class ClassificationData(LabelledData):
    """Texts or pairs of texts with a label each, several labels, or a number.

    Args:
        columns: Names of the tables' columns.
        kind: What is to be told: a `single` label, `several` at once (or none), or a `number`.
        separator: Of several labels in one string.
        options: Those of all labelled data, see `LabelledData`.
    """

    def __init__(
        self,
        columns: Columns = Columns(),
        kind: Literal["single", "several", "number"] = "single",
        separator: str = ",",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.columns, self.kind, self.separator = columns, kind, separator

    def key(self, row: Row) -> str:
        return "\n".join(row.text(column) for column in (self.columns.text, self.columns.pair) if column is not None)

    def find_labels(self, train: list[Row]) -> None:
        if self.kind != "number" and not self.labels:
            self.labels = self.label_names(train, {name for row in train for name in self.names(row)})

    def encode(self, split: str, rows: list[Row]) -> Examples:
        """The rows of a split as tokens and targets."""
        texts = [row.text(self.columns.text) for row in rows]
        pairs = None if self.columns.pair is None else [row.text(self.columns.pair) for row in rows]
        encoded = self.tokenizer(
            texts, pairs, return_attention_mask=False, truncation="longest_first", max_length=self.block_size
        )
        examples = [dict(zip(encoded, values)) for values in zip(*encoded.values())]
        cut = sum(bool(encoding.overflowing) for encoding in encoded.encodings)
        self.report(split, examples, cut, itertools.chain(texts, pairs or []))
        for example, row in zip(examples, rows):
            example["targets"] = torch.tensor(-100) if split == "predict" else self.target(row)
        return Examples(examples, self.seed if split == "train" else None)

    def names(self, row: Row) -> list[str]:
        """The labels of a row, without space around them.

        Raises:
            UserError: If there is none, but one is needed, or several where one is.
        """
        column = self.columns.label
        value, values = row.value(column), row.entries(column, strict=self.kind == "several")
        if self.kind == "single":
            if values is not None or isinstance(value, dict):
                raise UserError(
                    f"{row.where}: column {column!r} has {value!r:.40}, which is no single label: give --data.kind "
                    "several, or fix the row"
                )
            values = [value]
        elif values is None:
            values = value.split(self.separator) if isinstance(value, str) else [value]
        names = [cells.label(item) for item in values]
        if self.kind == "single" or not isinstance(value, str):  # beside separators, space is expected
            self.stripped += sum(map(cells.padded, values))
        if self.kind == "single" and not names[0]:
            raise UserError(f"{row.where}: the row has no label in column {column!r}: fix or remove it")
        if any(isinstance(item, (list, dict)) for item in values):
            raise UserError(
                f"{row.where}: column {column!r} has {value!r:.40}, which is no list of labels: fix the row"
            )
        return [name for name in names if name]

    def target(self, row: Row) -> torch.Tensor:
        """What is to be told of a row: () int64, the number of its label; (labels,) float32; or () float32."""
        if self.kind == "number":
            return torch.tensor(row.number(self.columns.label))
        numbers = [self.number(row, name) for name in self.names(row)]
        if self.kind == "single":
            return torch.tensor(numbers[0])
        return torch.tensor([float(number in numbers) for number in range(len(self.labels))])

    def identity(self) -> dict:
        return super().identity() | {"columns": asdict(self.columns)}
