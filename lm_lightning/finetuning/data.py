"""Labelled data: the base class of the data modules of all fine-tuning tasks.

A task defines the methods `key`, `encode` and, if it has labels, `find_labels`; `tokenize` and `tokenize_words` do most
of the work of `encode`.
"""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import DataLoader

from lm_lightning.data import cache
from lm_lightning.data.corpus import expand
from lm_lightning.data.formats import Format
from lm_lightning.data.hub_rows import hub_content
from lm_lightning.data.reading import ReadReport
from lm_lightning.data.stream import StreamData
from lm_lightning.data.tokenizer import Tokenizer, fingerprint, load, unknown_id, unknown_word
from lm_lightning.errors import UserError
from lm_lightning.finetuning import cells, encoding
from lm_lightning.finetuning.counts import Counts, described
from lm_lightning.finetuning.examples import Examples, collate
from lm_lightning.finetuning.store import content_of
from lm_lightning.finetuning.tables import FORMATS, Row, Tables, are_csv, read_split, sources
from lm_lightning.finetuning.words import encode_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NEEDED = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("predict",)}


class LabelledData(StreamData):
    """Base class of all labelled data. A subclass defines how rows are converted to tokens and targets (`encode`), and
    what their labels are (`labels_in` and `find_labels`).

    Rows are read as a stream and tokenized once, to files in `cache_dir` that are then mapped into memory. All
    attributes that `__init__` of a subclass sets count as options that affect the examples, unless they are in
    `not_encoded`; a change of one, or of the code of the task, tokenizes the rows again.

    Args:
        tables: Files of each split.
        tokenizer: The tokenizer; only its `path` is used. Default: the tokenizer of `model.pretrained`.
        max_length: Maximum number of tokens of a row, including special tokens; longer rows are truncated, and their
            number is printed.
        batch_size: Number of rows per micro-batch and process.
        num_workers: Number of processes that load batches in advance.
        cache_dir: Folder in which tokenized tables are cached.

    Attributes:
        formats: File formats that have short names and are detected by the suffixes of files.
        columns: Options of the task with the names of the tables' columns, a dataclass; a subclass may set it.
        not_encoded: Names of attributes of a subclass that do not affect the examples.
        in_memory: Whether `encode` is called once with all rows of a split, and its results stay in memory.
        labels: Names of the labels, in the order of their ids; `find_labels` sets it.
        examples: Examples of each split that is used.
        inputs: Rows for which `predict` computes predictions.
        counts: What is counted while rows are encoded, see `encode`.
        first_row: Number of the first one of the rows that `encode` gets.
    """

    length_option = "max_length"
    in_memory = False
    formats: Sequence[Format] = FORMATS
    columns: Any = None
    not_encoded: frozenset[str] = frozenset()

    def __init__(
        self,
        tables: Tables = Tables(),
        tokenizer: Tokenizer = Tokenizer(),
        max_length: int = 128,
        batch_size: int = 32,
        num_workers: int = 0,
        cache_dir: str = cache.DEFAULT,
    ) -> None:
        super().__init__()
        self.tables, self.tokenizer_options = tables, tokenizer
        self.batch_size, self.num_workers, self.cache_dir = batch_size, num_workers, cache_dir
        self.block_size = max_length
        self.labels: list[str] = []
        self.labels_known = False  # whether `labels` are those of the evaluated network
        self.reads_labels = False  # whether they are those of the training rows
        self.label_ids: dict[str, int] = {}
        self.examples: dict[str, Examples] = {}
        self.inputs: Sequence[Row] = []
        self.counts, self.first_row = Counts(), 0
        self.options: Any = None  # that affect the examples

    # Methods that a task defines

    def key(self, row: Row) -> str:
        """The part of a row, such as its text, that must not be in both splits if rows of `train` are held out."""
        raise NotImplementedError

    def labels_in(self, row: Row) -> Iterable[str]:
        """The names of the labels in a training row, if the task has labels."""
        return ()

    def find_labels(self, found: Mapping[str, str]) -> None:
        """Sets `labels`, if the task has any.

        Args:
            found: The names of the labels in all training rows, each with the file and line where it is first. Empty if
                the training rows are not read, as in an evaluation of a network that has the labels.
        """

    def encode(self, split: str, rows: list[Row]) -> list[dict]:
        """The examples of some rows of a split: the tokenizer's output for each row, and its targets, see `Examples`.

        It is called for one part of the rows after the other. Values of examples are lists of integers, tensors with
        zero dimensions or one and, under the key `notes`, what is not a part of batches, JSON-serializable. Rows of
        `predict` need no labels; their targets are ignored. What it omits or changes is added to `self.counts`, which
        `report` prints; apart from that, it must not change the object, as it is not called if the cache has the
        examples.
        """
        raise NotImplementedError

    def encoding_options(self, split: str) -> Any:
        """What affects the examples in addition to the options, the labels and the tokenizer, JSON-serializable."""
        return None

    def check_counts(self, split: str, counts: Counts) -> None:
        """Refuses a split, once all its rows are encoded, because of what was counted."""

    @property
    def has_labels(self) -> bool:
        """Whether the training rows have to be read for `labels_in`."""
        return type(self).labels_in is not LabelledData.labels_in

    # Setup

    @property
    def tokens_per_batch(self) -> int:
        """Number of targets per micro-batch and process, a constant by which the sum of losses is divided."""
        return self.batch_size

    def setup(self, stage: str) -> None:
        self.check()
        self.start_encoding()
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        # An evaluation needs the training rows only if the network does not have the labels.
        module = self.trainer.lightning_module
        named = stage != "fit" and (module.evaluated_network is not None or not module.keep_head)
        self.labels_known = named and bool(module.own_labels())
        self.reads_labels = self.has_labels and (stage == "fit" or bool(self.tables.train and not self.labels_known))
        self.find_labels(encoding.labels(self) if self.reads_labels else {})
        self.label_ids = {label: number for number, label in enumerate(self.labels)}
        self.spellings = {cells.canonical(label): number for label, number in self.label_ids.items()}
        for split in NEEDED[stage]:
            if split not in self.examples:
                found = encoding.in_memory(self, split) if self.in_memory else encoding.encoded(self, split)
                for note in found.notes:
                    self.print(note)
                if split == "predict":
                    self.inputs = found.inputs
                self.examples[split] = self.make_examples(split, found.examples)
                self.report(split, self.examples[split], found.counts)

    def start_encoding(self) -> None:
        """Loads what `encode` needs."""
        if self.options is None:
            others = self.not_encoded | vars(LabelledData()).keys() - {"block_size"}
            self.options = encoding.plain({k: v for k, v in vars(self).items() if k not in others})
        self.tokenizer = self.load_tokenizer()
        self.collate = self.make_collate()

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
        if self.tokenizer_options.min_count:
            raise UserError("data.tokenizer.min_count is for pretraining: omit it")
        if self.tokenizer_options.path is None:
            raise UserError("there is no tokenizer: give --data.tokenizer.path, or a --model.pretrained that has one")

    def make_examples(self, split: str, rows: Sequence[dict]) -> Examples:
        """The dataset of a split, with what `encode` returns."""
        return Examples(rows, self.seed if split == "train" else None)

    # Rows

    def read(self, split: str, report: ReadReport) -> Iterator[Row]:
        """The rows of a split, one at a time; `report` gets what was detected or replaced in the files."""
        return read_split(self.tables, split, self.key, self.formats, report)

    def files(self, split: str) -> list[Path]:
        """The files with the rows of a split."""
        if self.tables.hub:
            return []
        return [path for pattern in sources(self.tables, split) for _, path in expand(pattern)]

    def hub_content(self, split: str, folder: Path) -> list[str]:
        """The content of the rows of a split on the Hub, as hashes, which are cached in a folder."""
        tables = self.tables
        names = sources(tables, split) if tables.hub else []
        return [hub_content(str(tables.hub), tables.hub_config, name, tables.hub_revision, folder) for name in names]

    def holds_out(self) -> bool:
        """Whether the validation split is a part of the rows for training."""
        return not self.tables.validation

    # Tokens

    def tokenize(self, texts: list[str], pairs: list[str] | None = None) -> list[dict]:
        """Tokenizes texts, or pairs of texts, truncated to `max_length`, and counts tokens."""
        encoded = self.tokenizer(
            texts, pairs, return_attention_mask=False, truncation="longest_first", max_length=self.block_size
        )
        examples = [dict(zip(encoded, values)) for values in zip(*encoded.values())]
        truncated = sum(bool(encoding.overflowing) for encoding in encoded.encodings)
        self.count_tokens(examples, truncated, [*texts, *(pairs or [])])
        return examples

    def tokenize_words(self, sentences: list[list[str]]) -> list[dict]:
        """The same for sentences, with the position of each word's first token, see `encode_words`."""
        examples = encode_words(self.tokenizer, sentences, self.block_size)
        self.count_words(examples, sentences)
        return examples

    def count_tokens(self, examples: list[dict], truncated: int, texts: Iterable[str]) -> None:
        """Counts tokens of examples, also unknown ones, for the report.

        Args:
            examples: The examples.
            truncated: Number of examples that are truncated.
            texts: Texts of the examples.
        """
        self.counts.add("tokens", sum(len(example["input_ids"]) for example in examples))
        self.counts.add("truncated", truncated)
        if unknown := self.unknown(examples):
            known = self.counts.example("unknown")
            self.counts.add("unknown", unknown, known or unknown_word(self.tokenizer, texts))

    def count_words(self, examples: list[dict], sentences: list[list[str]]) -> None:
        """The same for examples with `words`, see `encode_words`, and how many words are truncated."""
        truncated = [int((example["words"] < 0).sum()) for example in examples]
        self.count_tokens(examples, len(truncated) - truncated.count(0), map(" ".join, sentences))
        self.counts.add("words", sum(len(example["words"]) for example in examples))
        self.counts.add("truncated words", sum(truncated))

    def unknown(self, examples: list[dict]) -> int:
        """Number of unknown tokens."""
        unknown = unknown_id(self.tokenizer)
        return 0 if unknown is None else sum(example["input_ids"].count(unknown) for example in examples)

    # Report

    def print(self, text: str) -> None:
        """Prints in the first process."""
        if self.trainer.is_global_zero:
            print(text)

    def report(self, split: str, examples: Examples, counts: Counts) -> None:
        """Prints the size of a split, and what was truncated or changed."""
        for line in described(split, len(examples), counts, self.block_size):
            self.print(line)

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
        self.counts.add("stripped", sum(map(cells.has_outer_space, values or [])))
        return names

    def label_names(self, labels: Iterable[str]) -> list[str]:
        """The labels in the order of their ids, which is that of the network if it already predicts the same labels.

        Args:
            labels: The labels in the training rows, if they are read.

        Raises:
            UserError: If neither the training split nor the network has labels, or they have different ones and the
                network is only evaluated.
        """
        found = set(labels)
        one = cells.merged(found)
        found = {one.get(name, name) for name in found}
        own, names = self.trainer.lightning_module.own_labels(), sorted(found)
        if self.reads_labels and len(names) < 2:
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
            self.counts.add("respelled")
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
        return not self.tables.hub and are_csv(self.tables, "predict", self.formats)

    # Description

    @property
    def info(self) -> dict:
        rows = {split: len(examples) for split, examples in self.examples.items()}
        return {"tables": self.tables.described(), "rows": rows, "labels": self.labels}

    def identity(self) -> dict:
        columns = {} if self.columns is None else {"columns": asdict(self.columns)}
        return {
            "training rows": content_of(self.examples["train"].rows),
            "tokenizer": fingerprint(self.tokenizer)[:16],
            "seed_everything": self.seed,
        } | columns


def padded(tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedTokenizerFast":
    """A tokenizer that pads on the right; one without a padding token, such as that of GPT, gets one."""
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
