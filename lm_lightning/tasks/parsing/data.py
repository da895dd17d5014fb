"""Data of dependency parsing: sentences with the head of each word and its relation to it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lm_lightning.errors import UserError
from lm_lightning.finetuning.data import LabelledData
from lm_lightning.finetuning.tables import Row


@dataclass
class TreeColumns:
    """Names of the columns; by default, those of CoNLL-U. Each contains a list, or a string with spaces.

    Args:
        words: The words.
        heads: The number of each word's head, counted from 1; 0 if the word is the root.
        relations: The name of each word's relation to its head.
    """

    words: str = "form"
    heads: str = "head"
    relations: str = "deprel"


class ParsingData(LabelledData):
    """Sentences with a dependency tree.

    Args:
        columns: Names of the tables' columns.
        options: Options of all labelled data, see `LabelledData`.
    """

    def __init__(self, columns: TreeColumns = TreeColumns(), **options: Any) -> None:
        super().__init__(**options)
        self.columns = columns

    def key(self, row: Row) -> str:
        return " ".join(row.words(self.columns.words))

    def labels_in(self, row: Row) -> list[str]:
        return self.labels_of(row, self.columns.relations)

    def find_labels(self, found: Mapping[str, str]) -> None:
        if not self.labels:
            self.labels = self.label_names(found)

    def encode(self, split: str, rows: list[Row]) -> list[dict]:
        """Tokenizes the rows of a split, and adds `words`, `targets` and `relations`, (W,) int64 each.

        These are the position of the first token of each word, see `encode_words`; the number of its head, from 1, or 0
        for the root; and the id of its relation.
        """
        sentences = [row.words(self.columns.words) for row in rows]
        examples = self.tokenize_words(sentences)
        for example, row, words in zip(examples, rows, sentences):
            if split == "predict":
                example["targets"] = example["relations"] = torch.full((len(words),), -100)
            else:
                example["targets"] = torch.tensor(self.heads(row, len(words)))
                example["relations"] = torch.tensor(self.relations(row, len(words)))
        return examples

    def heads(self, row: Row, words: int) -> list[int]:
        """The head of each word.

        Raises:
            UserError: If a head is not a word of the sentence, or the number of heads is not the number of words.
        """
        values: Any = row.value(self.columns.heads)
        found = row.entries(self.columns.heads)
        values = values.split() if found is None and isinstance(values, str) else found
        if values is None or len(values) != words:
            raise UserError(
                f"{row.where}: column {self.columns.heads!r} must have a head for each of the {words} words: fix it"
            )
        for number, value in enumerate(values, start=1):
            if not str(value).isdecimal() or int(value) > words or int(value) == number:
                raise UserError(
                    f"{row.where}: the head of word {number} is {value!r:.40}, but must be the number of another word, "
                    "or 0 for the root: fix the row"
                )
        return [int(value) for value in values]

    def relations(self, row: Row, words: int) -> list[int]:
        """The id of each word's relation.

        Raises:
            UserError: If a relation is unknown, or the number of relations is not the number of words.
        """
        names = self.labels_of(row, self.columns.relations, words)
        return [self.label_id(row, name, "relation") for name in names]
