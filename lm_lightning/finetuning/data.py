"""Labelled data: the base class of the data modules of all fine-tuning tasks.

A task defines the methods `key`, `encode` and, if it has labels, `find_labels`; `tokenize` and `tokenize_words` do most
of the work of `encode`.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

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
    warn_about_unknown,
)
from lm_lightning.errors import UserError
from lm_lightning.finetuning import cells
from lm_lightning.finetuning.examples import Examples, collate
from lm_lightning.finetuning.tables import FORMATS, PREFIX, Row, Tables, read_split, sources
from lm_lightning.finetuning.words import encode_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NEEDED = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("predict",)}


class LabelledData(StreamData):
    """Base class of all labelled data. A subclass defines how rows are converted to tokens and targets (`encode`), and
    what their labels are (`find_labels`).

    Args:
        tables: Files of each split.
        tokenizer: The tokenizer; only its `path` is used. Default: the tokenizer of `model.pretrained`.
        max_length: Maximum number of tokens of a row, including special tokens; longer rows are truncated, and their
            number is printed.
        batch_size: Number of rows per micro-batch and process.
        num_workers: Number of processes that load batches in advance.

    Attributes:
        formats: File formats that have short names and are detected by the suffixes of files.
        columns: Options of the task with the names of the tables' columns, a dataclass; a subclass may set it.
        has_labels: Whether an evaluation may have to read the labels of the training rows.
        labels: Names of the labels, in the order of their ids; `find_labels` sets it.
        examples: Examples of each split that is used.
        inputs: Rows for which `predict` computes predictions.
    """

    length_option = "max_length"
    has_labels = True  # whether there are labels, which an evaluation may have to find in the training rows
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
        self.labels_known = False  # whether `labels` are those of the evaluated network
        self.label_ids: dict[str, int] = {}
        self.examples: dict[str, Examples] = {}
        self.inputs: list[Row] = []
        self.respelled = 0  # number of a split's labels whose spelling was replaced by an equivalent one
        self.stripped = 0  # number of a split's labels with surrounding white space

    # Methods that a task defines

    def key(self, row: Row) -> str:
        """The part of a row, such as its text, that must not be in both splits if rows of `train` are held out."""
        raise NotImplementedError

    def find_labels(self, train: list[Row]) -> None:
        """Sets `labels`, if the task has any, from the training rows; except in `fit`, there may be no rows."""

    def encode(self, split: str, rows: list[Row]) -> list[dict]:
        """The examples of a split: the tokenizer's output for each row, and its targets, see `Examples`.

        Rows of `predict` need no labels; their targets are ignored. Prints a `report` of the split.
        """
        raise NotImplementedError

    # Setup

    @property
    def tokens_per_batch(self) -> int:
        """Number of targets per micro-batch and process, a constant by which the sum of losses is divided."""
        return self.batch_size

    def setup(self, stage: str) -> None:
        self.check()
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        self.tokenizer = self.load_tokenizer()
        self.collate = self.make_collate()
        # An evaluation needs the training rows only if the network does not have the labels.
        module = self.trainer.lightning_module
        named = stage != "fit" and (module.evaluated_network is not None or not module.keep_head)
        self.labels_known = named and bool(module.own_labels())
        needs_train = stage == "fit" or (self.has_labels and self.tables.train and not self.labels_known)
        train = self.read("train") if needs_train else []
        self.find_labels(train)
        self.label_ids = {label: number for number, label in enumerate(self.labels)}
        self.spellings = {cells.canonical(label): number for label, number in self.label_ids.items()}
        for split in NEEDED[stage]:
            if split not in self.examples:
                rows = train if split == "train" else self.read(split)
                if split == "predict":
                    self.inputs = rows
                self.respelled = self.stripped = 0
                self.examples[split] = self.make_examples(split, self.encode(split, rows))
                self.report_labels(split)

    def load_tokenizer(self) -> "PreTrainedTokenizerFast":
        """Loads the tokenizer; a subclass may change it."""
        return padded(load(str(self.tokenizer_options.path)))

    def make_collate(self) -> Callable[[list[dict]], dict]:
        """The function that collates examples to a batch."""
        return functools.partial(collate, self.tokenizer)

    def check(self) -> None:
        """Refuses invalid options."""
        for name, value, least in (
            ("max_length", self.block_size, 3),
            ("batch_size", self.batch_size, 1),
            ("num_workers", self.num_workers, 0),
        ):
            if value < least:
                raise UserError(f"data.{name} is {value}, but must be {least} or more")
        if self.tokenizer_options.path is None:
            raise UserError("there is no tokenizer: give --data.tokenizer.path, or a --model.pretrained that has one")

    def make_examples(self, split: str, rows: list[dict]) -> Examples:
        """The dataset of a split, with what `encode` returns."""
        return Examples(rows, self.seed if split == "train" else None)

    def read(self, split: str) -> list[Row]:
        """The rows of a split."""
        return read_split(self.tables, split, self.key, self.formats)

    # Tokens

    def tokenize(self, split: str, texts: list[str], pairs: list[str] | None = None) -> list[dict]:
        """Tokenizes texts, or pairs of texts, truncated to `max_length`, and prints a `report` of the split."""
        encoded = self.tokenizer(
            texts, pairs, return_attention_mask=False, truncation="longest_first", max_length=self.block_size
        )
        examples = [dict(zip(encoded, values)) for values in zip(*encoded.values())]
        truncated = sum(bool(encoding.overflowing) for encoding in encoded.encodings)
        self.report(split, examples, truncated, [*texts, *(pairs or [])])
        return examples

    def tokenize_words(self, split: str, sentences: list[list[str]]) -> list[dict]:
        """The same for sentences, with the position of each word's first token, see `encode_words`."""
        examples = encode_words(self.tokenizer, sentences, self.block_size)
        self.report_words(split, examples, sentences)
        return examples

    def print(self, text: str) -> None:
        """Prints in the first process."""
        if self.trainer.is_global_zero:
            print(text)

    def report(self, split: str, examples: list[dict], truncated: int, texts: Iterable[str]) -> None:
        """Prints the size of a split, and how many of its tokens are unknown.

        Args:
            split: Name of the split.
            examples: Examples of the split.
            truncated: Number of examples that are truncated.
            texts: Texts of the examples.
        """
        tokens = sum(len(example["input_ids"]) for example in examples)
        unknown = self.unknown(examples)
        self.print(
            f"{split}: {len(examples):,} rows, {tokens:,} tokens"
            + (f", {truncated:,} rows are truncated to {self.block_size} tokens (data.max_length)" if truncated else "")
            + about_unknown(unknown, tokens)
        )
        self.warn_about_unknown(split, unknown, tokens, texts)

    def report_words(self, split: str, examples: list[dict], sentences: list[list[str]]) -> None:
        """The same for examples with `words`, see `encode_words`, and how many words are truncated."""
        truncated = [int((example["words"] < 0).sum()) for example in examples]
        self.report(split, examples, len(truncated) - truncated.count(0), map(" ".join, sentences))
        if any(truncated):
            words = sum(len(example["words"]) for example in examples)
            self.print(f"{split}: {sum(truncated):,} of {words:,} words are truncated, and count as false negatives")

    def unknown(self, examples: list[dict]) -> int:
        """Number of unknown tokens."""
        unknown = unknown_id(self.tokenizer)
        return 0 if unknown is None else sum(example["input_ids"].count(unknown) for example in examples)

    def warn_about_unknown(self, split: str, unknown: int, tokens: int, texts: Iterable[str]) -> None:
        """Prints a warning if many tokens of the texts are unknown."""
        if unknown > MANY * tokens and self.trainer.is_global_zero:
            remedy = "use a --model.pretrained whose tokenizer covers such text, or fix --data.tables.encoding"
            warn_about_unknown(split, unknown, tokens, unknown_word(self.tokenizer, texts), remedy)

    # Labels

    def labels_of(self, row: Row, column: str, words: int | None = None) -> list[str]:
        """The labels in a column of a row. Unlike words, they may be numbers; surrounding white space is removed.

        Args:
            row: The row.
            column: Name of the column.
            words: The number of labels that there must be, one for each word. Default: any number.

        Raises:
            UserError: If there are none or too few or too many, or one is empty.
        """
        values = row.entries(column)
        names = row.words(column) if values is None else [cells.label(value) for value in values]
        if not names or not all(names):
            raise UserError(
                f"{row.where}: column {column!r} is {row[column]!r:.40}, but must be a list of labels: fix or remove "
                "the row"
            )
        if words not in (None, len(names)):
            raise UserError(
                f"{row.where}: there are {words} words, but {len(names)} labels in the column {column!r}: fix the row"
            )
        self.stripped += sum(map(cells.has_outer_space, values or []))
        return names

    def label_names(self, train: list[Row], found: set[str]) -> list[str]:
        """The labels in the order of their ids, which is that of the network if it already predicts the same labels.

        Args:
            train: The training rows, if there are any.
            found: The labels in the training rows.

        Raises:
            UserError: If neither the training split nor the network has labels, or they have different ones and the
                network is only evaluated.
        """
        one = cells.merged(found)
        found = {one.get(name, name) for name in found}
        own, names = self.trainer.lightning_module.own_labels(), sorted(found)
        if train and len(names) < 2:
            raise UserError(f"the training split has {len(names)} label, but must have 2 or more")
        if not found or set(map(cells.canonical, found)) == set(map(cells.canonical, own)):
            if not own:
                raise UserError("the labels are read from the training split: give --data.tables.train")
            return own
        if self.trainer.state.fn != "fit" and self.trainer.lightning_module.evaluated_network is None:
            if not own:
                raise UserError(
                    f"model.pretrained has no head for the labels {', '.join(names[:20])}: train it with `fit` first, "
                    "or give a --ckpt_path"
                )
            if not (self.trainer.lightning_module.keep_head and len(own) == len(names)):
                raise UserError(
                    f"model.pretrained predicts the labels {', '.join(own[:20])}, but the training split has "
                    f"{', '.join(names[:20])}: omit --data.tables.train to use the labels of the network, or train it "
                    "with `fit` first"
                )
        return names

    def label_id(self, row: Row, label: str, what: str = "label") -> int:
        """The id of a row's label.

        Raises:
            UserError: If it is unknown; `what` is what it is called in the message.
        """
        if label not in self.label_ids and (number := self.spellings.get(cells.canonical(label))) is not None:
            self.respelled += 1
            return number
        if label not in self.label_ids:
            whose, advice = "the training split", "add training rows with it"
            if self.labels_known or not self.tables.train:
                whose, advice = "the evaluated network", "evaluate a network that was trained with it"
            raise UserError(
                f"{row.where}: the {what} {label!r} is not one of {whose} ({', '.join(self.labels[:20])}): "
                f"fix the row, or {advice}"
            )
        return self.label_ids[label]

    def report_labels(self, split: str) -> None:
        """Prints how many labels of a split were changed."""
        if self.stripped:
            self.print(f"{split}: white space around {self.stripped:,} labels was removed")
        if self.respelled:
            self.print(f"{split}: {self.respelled:,} labels have several spellings (as 1 and 1.0), which are merged")

    # Batches

    def samples(self, split: str) -> Examples:
        examples = self.examples[split]
        if split != "train":
            limit = getattr(self.trainer, f"limit_{'val' if split == 'validation' else split}_batches")
            # The longest batches are not representative, so an evaluation of a part of the split uses the first rows.
            part = isinstance(limit, int) or limit < 1
            examples.order = np.arange(len(examples)) if part else examples.longest_first
        return examples

    def predict_dataloader(self) -> DataLoader:
        return self.evaluation_loader("predict")

    @property
    def predict_table(self) -> bool:
        """Whether the rows to predict come from CSV or TSV files, so that predictions are also written as a table."""
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


def padded(tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedTokenizerFast":
    """A tokenizer that pads on the right; one without a padding token, such as that of GPT, gets one."""
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def count_phrase(number: int, what: str) -> str:
    """A number of things, as part of a sentence; empty if it is 0."""
    return f", {number:,} {what}" if number else ""
