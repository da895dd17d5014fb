"""Data of classification: rows with a text, or a pair of texts, and a label in; batches of tokens and targets out."""

import functools
import hashlib
import math
import os
from dataclasses import asdict, dataclass
from typing import Literal, Optional

import torch

from lm_lightning.data import labelled
from lm_lightning.data.labelled import Examples, Row, Tables
from lm_lightning.data.stream import StreamData
from lm_lightning.data.tokenizer import Tokenizer, fingerprint, load
from lm_lightning.errors import UserError


@dataclass
class Columns:
    """Names of the columns.

    Args:
        text: The text.
        pair: The second text of a pair, if there are pairs.
        label: The label; of `several`, a list of them, or a string in which `separator` stands between them.
    """

    text: str = "text"
    pair: Optional[str] = None
    label: str = "label"


class ClassificationData(StreamData):
    """Texts or pairs of texts with a label each, several labels, or a number.

    Args:
        tables: Files of each split.
        columns: Names of their columns.
        kind: What is to be told: a `single` label, `several` at once (or none), or a `number`.
        separator: Of several labels in one string.
        tokenizer: Only its `path` counts. Default: that of `model.pretrained`.
        max_length: Tokens of a text or pair with the special ones; longer ones are cut, and counted.
        batch_size: Texts in a micro-batch of one process.
        num_workers: Processes that load batches ahead.
    """

    def __init__(
        self,
        tables: Tables = Tables(),
        columns: Columns = Columns(),
        kind: Literal["single", "several", "number"] = "single",
        separator: str = ",",
        tokenizer: Tokenizer = Tokenizer(),
        max_length: int = 128,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.tables, self.columns, self.kind, self.separator = tables, columns, kind, separator
        self.tokenizer_options, self.batch_size, self.num_workers = tokenizer, batch_size, num_workers
        self.block_size = max_length
        self.labels: list[str] = []  # their names, in the order of their numbers
        self.examples: dict[str, Examples] = {}

    @property
    def tokens_per_batch(self) -> int:
        """Targets of a micro-batch of one process: a constant by which its sum of losses is divided."""
        return self.batch_size

    def setup(self, stage: str) -> None:
        for name, least in (("max_length", 3), ("batch_size", 1), ("num_workers", 0)):
            value = self.block_size if name == "max_length" else getattr(self, name)
            if value < least:
                raise UserError(f"data.{name} is {value}, but must be {least} or more")
        if self.tokenizer_options.path is None:
            raise UserError("say which tokenizer to use: --data.tokenizer.path, or --model.pretrained with one")
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        self.tokenizer = load(self.tokenizer_options.path)
        self.tokenizer.padding_side = "right"
        self.collate = functools.partial(labelled.padded, self.tokenizer)
        train = labelled.read(self.tables, "train") if self.tables.train or stage == "fit" else []
        if self.kind != "number" and not self.labels:
            self.labels = self.label_names(train)
        needed = {"fit": ["train", "validation"], "validate": ["validation"], "test": ["test"], "predict": ["predict"]}
        for split in needed[stage]:
            if split not in self.examples:
                self.examples[split] = self.encode(
                    split, train if split == "train" else labelled.read(self.tables, split)
                )

    def label_names(self, train: list[Row]) -> list[str]:
        """The labels in the order of their numbers: that of the network, if it tells the same ones already.

        Raises:
            UserError: If neither the training split nor the network says which they are, or they do not agree where
                the network is only measured.
        """
        own, found = (
            self.trainer.lightning_module.own_labels(),
            sorted({name for row in train for name in self.names(row)}),
        )
        if train and len(found) < 2:
            raise UserError(f"the training split has {len(found)} label, but must have 2 or more")
        if set(found) == set(own) or not found:
            if not own:
                raise UserError("which labels there are, the training split says: give --data.tables.train")
            return own
        if own and self.trainer.state.fn != "fit" and self.trainer.ckpt_path is None:
            raise UserError(
                f"model.pretrained tells the labels {', '.join(own[:20])}, but the training split has "
                f"{', '.join(found[:20])}: leave --data.tables.train out to take the network's, or fit it first"
            )
        return found

    def encode(self, split: str, rows: list[Row]) -> Examples:
        """Tokenizes the rows of a split and tells what it has."""
        texts = [row.text(self.columns.text) for row in rows]
        pairs = None if self.columns.pair is None else [row.text(self.columns.pair) for row in rows]
        encoded = self.tokenizer(
            texts, pairs, return_attention_mask=False, truncation="longest_first", max_length=self.block_size
        )
        cut = sum(bool(encoding.overflowing) for encoding in encoded.encodings)
        encodings = [dict(zip(encoded, values)) for values in zip(*encoded.values())]
        if split == "predict":
            targets = torch.full((len(rows),), -100)
        else:
            targets = torch.stack([self.target(row) for row in rows])
        if self.trainer.is_global_zero:
            tokens = sum(map(len, (encoding["input_ids"] for encoding in encodings)))
            print(
                f"{split}: {len(rows):,} rows, {tokens:,} tokens"
                + (f", {cut:,} rows are cut to {self.block_size} tokens (data.max_length)" if cut else "")
            )
        seed = self.seed if split == "train" else None
        return Examples(encodings, targets, math.nan if targets.is_floating_point() else -100, seed)

    def names(self, row: Row) -> list[str]:
        """The labels of a row."""
        if self.columns.label not in row:
            row.text(self.columns.label)  # refuses it
        value = row[self.columns.label]
        if self.kind == "single":
            if value is None or str(value).strip() == "":
                raise UserError(
                    f"{row.where}: the row has no label in column {self.columns.label!r}: mend or remove it"
                )
            return [str(value)]
        values = value if isinstance(value, list) else str(value or "").split(self.separator)
        return [str(label).strip() for label in values if str(label).strip()]

    def target(self, row: Row) -> torch.Tensor:
        """What is to be told of a row: () int64, the number of its label; (labels,) float32; or () float32."""
        if self.kind == "number":
            value = row.get(self.columns.label)
            try:
                number = float(value)  # type: ignore[arg-type]
            except (TypeError, ValueError):
                number = math.nan
            if not math.isfinite(number):
                raise UserError(f"{row.where}: column {self.columns.label!r} has no number, but {value!r:.40}")
            return torch.tensor(number)
        names = self.names(row)
        for name in names:
            if name not in self.labels:
                whose = "the training split" if self.tables.train else "model.pretrained"
                raise UserError(
                    f"{row.where}: the label {name!r} is none of {whose} ({', '.join(self.labels[:20])}): "
                    "mend the row, or give training rows that have it"
                )
        if self.kind == "single":
            return torch.tensor(self.labels.index(names[0]))
        return torch.tensor([float(label in names) for label in self.labels])

    def samples(self, split: str) -> Examples:
        return self.examples[split]

    @property
    def predict_table(self) -> bool:
        """Whether the rows to predict come from CSV or TSV files, so that the predictions are wanted as such."""
        paths = labelled.files(self.tables, "predict")
        return all(labelled.kind(path, self.tables) in (".csv", ".tsv") for path in paths)

    def predict_dataloader(self) -> torch.utils.data.DataLoader:
        return self.evaluation_loader("predict")

    @property
    def info(self) -> dict:
        rows = {split: len(examples) for split, examples in self.examples.items()}
        return {"tables": asdict(self.tables), "rows": rows, "labels": self.labels}

    def identity(self) -> dict:
        content = hashlib.sha256()
        for encoding, target in zip(self.examples["train"].encodings, self.examples["train"].targets.tolist()):
            content.update(repr((encoding["input_ids"], target)).encode())
        return {
            "training rows": content.hexdigest()[:16],
            "columns": asdict(self.columns),
            "tokenizer": fingerprint(self.tokenizer)[:16],
            "seed_everything": self.seed,
        }
