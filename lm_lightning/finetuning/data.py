"""Labelled data: what the data modules of all fine-tuning tasks share.

A task defines three methods: `key`, `find_labels`, if it has labels, and `encode`; `tokenize` and `tokenize_words` do
most of the latter.
"""

import functools
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from lm_lightning.data.corpus import expand
from lm_lightning.data.formats import Csv, Format, find
from lm_lightning.data.stream import StreamData
from lm_lightning.data.tokenizer import (
    MANY,
    Tokenizer,
    about_unknown,
    fingerprint,
    load,
    unknown_id,
    unknown_word,
    warn_of_unknown,
)
from lm_lightning.errors import UserError
from lm_lightning.finetuning import cells
from lm_lightning.finetuning.examples import Examples, collate
from lm_lightning.finetuning.tables import FORMATS, PREFIX, Row, Tables, read_split, sources
from lm_lightning.finetuning.words import encode_words

NEEDED = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("predict",)}


class LabelledData(StreamData):
    """Base of all labelled data; a subclass defines how rows become tokens and targets (`encode`), and what their
    labels are (`find_labels`).

    Args:
        tables: Files of each split.
        tokenizer: Only its `path` counts. Default: that of `model.pretrained`.
        max_length: Tokens of a row with the special ones; longer ones are truncated, and counted.
        batch_size: Rows in a micro-batch of one process.
        num_workers: Processes that load batches ahead.

    Attributes:
        formats: File formats that are found by the names of files and have short names.
        columns: Options of the task with the names of the tables' columns, a dataclass; a subclass may set it.
        labels: Names of the labels, in the order of their ids; `find_labels` sets it.
        examples: Of each split that is used.
        inputs: Rows that `predict` predicts.
    """

    length_option = "max_length"
    formats: Sequence[Format] = FORMATS
    columns: Any = None

    def __init__(
        self,
        tables: Tables = Tables(),
        tokenizer: Tokenizer = Tokenizer(),
        max_length: int = 128,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.tables, self.tokenizer_options = tables, tokenizer
        self.batch_size, self.num_workers = batch_size, num_workers
        self.block_size = max_length
        self.labels: list[str] = []
        self.labels_known = False  # whether they are those of the network that is evaluated
        self.label_ids: dict[str, int] = {}
        self.examples: dict[str, Examples] = {}
        self.inputs: list[Row] = []
        self.respelled = 0  # labels of a split that are spelled in another way than the one that they are counted as
        self.stripped = 0  # labels of a split with space around them

    # What a task defines

    def key(self, row: Row) -> str:
        """What of a row is never in both training and validation, where the latter is a share of `tables.train`."""
        raise NotImplementedError

    def find_labels(self, train: list[Row]) -> None:
        """Sets `labels`, if the task has any, from the training rows, which may be none unless it is `fit`."""

    def encode(self, split: str, rows: list[Row]) -> list[dict]:
        """The examples of a split: what the tokenizer returns of each row, and its targets, see `Examples`.

        Rows of `predict` need no labels; their targets are ignored ones. It prints what `report` prints.
        """
        raise NotImplementedError

    # Setup

    @property
    def tokens_per_batch(self) -> int:
        """Targets of a micro-batch of one process: a constant by which its sum of losses is divided."""
        return self.batch_size

    def setup(self, stage: str) -> None:
        self.check()
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        self.tokenizer = load(str(self.tokenizer_options.path))
        self.tokenizer.padding_side = "right"
        if self.tokenizer.pad_token is None:  # as GPT's published ones
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.collate = functools.partial(collate, self.tokenizer)
        # An evaluation needs the training rows only if the labels are not known otherwise.
        module = self.trainer.lightning_module
        named = stage != "fit" and (module.evaluated_network is not None or not module.keep_head)
        self.labels_known = named and bool(module.own_labels())
        needs_train = stage == "fit" or (self.tables.train and not self.labels_known)
        train = read_split(self.tables, "train", self.key, self.formats) if needs_train else []
        self.find_labels(train)
        self.label_ids = {label: number for number, label in enumerate(self.labels)}
        self.spellings = {cells.canonical(label): number for label, number in self.label_ids.items()}
        for split in NEEDED[stage]:
            if split not in self.examples:
                rows = train if split == "train" else self.read(split)
                if split == "predict":
                    self.inputs = rows
                self.respelled = self.stripped = 0
                self.examples[split] = Examples(self.encode(split, rows), self.seed if split == "train" else None)
                self.report_labels(split)

    def check(self) -> None:
        """Refuses options that mean nothing."""
        for name, value, least in (
            ("max_length", self.block_size, 3),
            ("batch_size", self.batch_size, 1),
            ("num_workers", self.num_workers, 0),
        ):
            if value < least:
                raise UserError(f"data.{name} is {value}, but must be {least} or more")
        if self.tokenizer_options.path is None:
            raise UserError("say which tokenizer to use: --data.tokenizer.path, or --model.pretrained with one")

    def read(self, split: str) -> list[Row]:
        """The rows of a split."""
        return read_split(self.tables, split, self.key, self.formats)

    # Tokens

    def tokenize(self, split: str, texts: list[str], pairs: list[str] | None = None) -> list[dict]:
        """What the tokenizer returns of each text, or pair of texts, truncated to `max_length`; prints the `report`."""
        encoded = self.tokenizer(
            texts, pairs, return_attention_mask=False, truncation="longest_first", max_length=self.block_size
        )
        examples = [dict(zip(encoded, values)) for values in zip(*encoded.values())]
        truncated = sum(bool(encoding.overflowing) for encoding in encoded.encodings)
        self.report(split, examples, truncated, [*texts, *(pairs or [])])
        return examples

    def tokenize_words(self, split: str, sentences: list[list[str]]) -> list[dict]:
        """The same of sentences, with the place of each word's first token, see `encode_words`."""
        examples = encode_words(self.tokenizer, sentences, self.block_size)
        self.report_words(split, examples, sentences)
        return examples

    def print(self, text: str) -> None:
        """Prints in the first process."""
        if self.trainer.is_global_zero:
            print(text)

    def report(self, split: str, examples: list[dict], truncated: int, texts: Iterable[str]) -> None:
        """Prints what a split has, and how many of its tokens are unknown.

        Args:
            split: Its name.
            examples: Its examples.
            truncated: How many of them are truncated.
            texts: Their texts.
        """
        tokens = sum(len(example["input_ids"]) for example in examples)
        unknown = self.unknown(examples)
        self.print(
            f"{split}: {len(examples):,} rows, {tokens:,} tokens"
            + (f", {truncated:,} rows are truncated to {self.block_size} tokens (data.max_length)" if truncated else "")
            + about_unknown(unknown, tokens)
        )
        self.warn_of_unknown(split, unknown, tokens, texts)

    def report_words(self, split: str, examples: list[dict], sentences: list[list[str]]) -> None:
        """The same of examples with `words`, see `encode_words`, and how many of these are truncated."""
        truncated = [int((example["words"] < 0).sum()) for example in examples]
        self.report(split, examples, len(truncated) - truncated.count(0), map(" ".join, sentences))
        if any(truncated):
            words = sum(len(example["words"]) for example in examples)
            self.print(f"{split}: {sum(truncated):,} of {words:,} words are truncated, and count as false negatives")

    def unknown(self, examples: list[dict]) -> int:
        """How many tokens are unknown."""
        unknown = unknown_id(self.tokenizer)
        return 0 if unknown is None else sum(example["input_ids"].count(unknown) for example in examples)

    def warn_of_unknown(self, split: str, unknown: int, tokens: int, texts: Iterable[str]) -> None:
        """Prints a warning if many tokens of some texts are unknown."""
        if unknown > MANY * tokens and self.trainer.is_global_zero:
            remedy = "use a --model.pretrained whose tokenizer knows such text, or fix --data.tables.encoding"
            warn_of_unknown(split, unknown, tokens, unknown_word(self.tokenizer, texts), remedy)

    # Labels

    def labels_of(self, row: Row, column: str) -> list[str]:
        """The labels in a column of a row, like its words, but also numbers, and without space around them.

        Raises:
            UserError: If there are none, or one is empty.
        """
        values = row.entries(column)
        names = row.words(column) if values is None else [cells.label(value) for value in values]
        if not names or not all(names):
            raise UserError(
                f"{row.where}: column {column!r} has no labels, but {row[column]!r:.40}: fix or remove the row"
            )
        self.stripped += sum(map(cells.has_outer_space, values or []))
        return names

    def label_names(self, train: list[Row], found: set[str]) -> list[str]:
        """The labels in the order of their ids: that of the network, if it predicts the same ones already.

        Args:
            train: The training rows, if there are any.
            found: The labels in them.

        Raises:
            UserError: If neither the training split nor the network has labels, or they do not agree where the network
                is only evaluated.
        """
        one = cells.merged(found)
        found = {one.get(name, name) for name in found}
        own, names = self.trainer.lightning_module.own_labels(), sorted(found)
        if train and len(names) < 2:
            raise UserError(f"the training split has {len(names)} label, but must have 2 or more")
        if not found or set(map(cells.canonical, found)) == set(map(cells.canonical, own)):
            if not own:
                raise UserError("the labels are those of the training split: give --data.tables.train")
            return own
        if self.trainer.state.fn != "fit" and self.trainer.lightning_module.evaluated_network is None:
            if not own:
                raise UserError(
                    f"model.pretrained has no head for the labels {', '.join(names[:20])}: fit it first, or give a "
                    "--ckpt_path"
                )
            if not (self.trainer.lightning_module.keep_head and len(own) == len(names)):
                raise UserError(
                    f"model.pretrained predicts the labels {', '.join(own[:20])}, but the training split has "
                    f"{', '.join(names[:20])}: omit --data.tables.train to use the network's, or fit it first"
                )
        return names

    def label_id(self, row: Row, label: str, what: str = "label") -> int:
        """The id of a row's label.

        Raises:
            UserError: If it is unknown; calls it `what`.
        """
        if label not in self.label_ids and (number := self.spellings.get(cells.canonical(label))) is not None:
            self.respelled += 1
            return number
        if label not in self.label_ids:
            whose, advice = "the training split", "give training rows that have it"
            if self.labels_known or not self.tables.train:
                whose, advice = "the evaluated network", "evaluate a network that was trained with it"
            raise UserError(
                f"{row.where}: the {what} {label!r} is none of {whose} ({', '.join(self.labels[:20])}): "
                f"fix the row, or {advice}"
            )
        return self.label_ids[label]

    def report_labels(self, split: str) -> None:
        """Prints how many labels of a split were changed."""
        if self.stripped:
            self.print(f"{split}: space around {self.stripped:,} labels was removed")
        if self.respelled:
            self.print(f"{split}: {self.respelled:,} labels are spelled in several ways (1 and 1.0), and count as one")

    # Batches

    def samples(self, split: str) -> Examples:
        examples = self.examples[split]
        if split != "train":
            limit = getattr(self.trainer, f"limit_{'val' if split == 'validation' else split}_batches")
            # The first of the longest batches are not like the others; of a part, the first rows are evaluated.
            part = isinstance(limit, int) or limit < 1
            examples.order = np.arange(len(examples)) if part else examples.longest_first
        return examples

    def predict_dataloader(self) -> DataLoader:
        return self.evaluation_loader("predict")

    @property
    def predict_table(self) -> bool:
        """Whether the rows to predict come from CSV or TSV files, so that the predictions are wanted as such."""
        if self.tables.hub:
            return False
        paths = [path for pattern in sources(self.tables, "predict") for _, path in expand(pattern)]
        return bool(paths) and all(
            isinstance(find(path, self.tables.format, self.formats, PREFIX), Csv) for path in paths
        )

    # Description

    @property
    def info(self) -> dict:
        rows = {split: len(examples) for split, examples in self.examples.items()}
        return {"tables": self.tables.described(), "rows": rows, "labels": self.labels}

    def identity(self) -> dict:
        content = hashlib.sha256()
        for row in self.examples["train"].rows:
            fields = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in row.items()}
            content.update(repr(fields).encode())
        columns = {} if self.columns is None else {"columns": asdict(self.columns)}
        return {
            "training rows": content.hexdigest()[:16],
            "tokenizer": fingerprint(self.tokenizer)[:16],
            "seed_everything": self.seed,
        } | columns


def counted(number: int, what: str) -> str:
    """A part of a sentence, empty if there is nothing to count."""
    return f", {number:,} {what}" if number else ""
