"""Labelled data: tables of rows in, tokens with their labels out, in an order that needs little padding.

What a task makes of its rows is its own affair (`classification.py`); here is what all share: reading tables whose
columns have any names, the names of the labels, batches of similar lengths, and the place to go on from.
"""

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from lm_lightning.data import cells, formats
from lm_lightning.data.corpus import expand
from lm_lightning.data.order import PADDING, by_length, samples_at
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

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMATS = {name: f".{name}" for name in ("jsonl", "csv", "tsv", "parquet", "conll", "conllu")} | {"squad": ".json"}
TABLES = formats.ROWS | {
    ".conll": formats.conll_rows,
    ".conllu": formats.conllu_rows,
    ".json": formats.squad_rows,
}


@dataclass
class Tables:
    """Where the rows of each split come from.

    Args:
        train: Files, folders or patterns of the training split: JSONL, CSV, TSV, Parquet, and of words with labels
            CoNLL (a word a line with its labels) and CoNLL-U, of questions JSON as of SQuAD; also as .gz and .zst.
        validation: The same of the validation split. Without any, rows of `train` are taken by a hash of their text,
            so that no text is in both.
        test: The same of the test split.
        predict: The same of the rows that `predict` answers; they need no labels. Default: those of `test`.
        validation_fraction: Share of `train` for validation, where no files are given for it.
        format: Of all files, where their names do not tell.
        header: Names of the columns, for CSV and TSV files whose first line is a row already, and for CoNLL files,
            whose columns are `0`, `1`, ... without it.
        delimiter: Character between the columns of CSV and TSV files. Default: a tab in TSV files, a comma in CSV files
            or, if their first line has no comma, the semicolon, tab or bar in it.
        quoting: Whether double quotes enclose cells of CSV and TSV files. Default: in CSV files only.
        encoding: Encoding of the files, such as `utf-8`, `utf-16`, `cp1252` or `gb18030`.
        encoding_errors: What to do with bytes that the encoding does not allow: stop (`strict`), or `replace` each by
            U+FFFD and report their number.
        hub: Name of a data set of the Hugging Face Hub; `train` and the others then name its splits, not files.
        hub_config: Its configuration.
        hub_revision: Its branch, tag or commit.
    """

    train: list[str] | str = field(default_factory=list)
    validation: list[str] | str = field(default_factory=list)
    test: list[str] | str = field(default_factory=list)
    predict: list[str] | str = field(default_factory=list)
    validation_fraction: float = 0.1
    format: Optional[Literal["jsonl", "csv", "tsv", "parquet", "conll", "conllu", "squad"]] = None
    header: Optional[list[str]] = None
    delimiter: Optional[str] = None
    quoting: Optional[bool] = None
    encoding: str = "utf-8"
    encoding_errors: Literal["strict", "replace"] = "strict"
    hub: Optional[str] = None
    hub_config: Optional[str] = None
    hub_revision: Optional[str] = None

    def __post_init__(self) -> None:
        for split in ("train", "validation", "test", "predict"):
            value = getattr(self, split)
            setattr(self, split, [value] if isinstance(value, str) else value)


class Row(Mapping):
    """A row of a table, which knows where it is from.

    Args:
        values: By the names of the columns.
        where: File and number of the line, for messages.
        header: Whether the options of CSV and TSV files decide what its columns are called, for messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str, header: bool = False) -> None:
        self.values_by_column, self.where, self.header = values, where, header

    def __getitem__(self, column: str) -> Any:
        return self.values_by_column[column]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_column)

    def __len__(self) -> int:
        return len(self.values_by_column)

    def value(self, column: str) -> Any:
        """What a column has.

        Raises:
            UserError: If there is no such column.
        """
        if column not in self:
            raise UserError(
                f"{self.where}: there is no column {column!r}; the columns are {', '.join(map(str, self))}: name the "
                "right one with --data.columns"
                + (", or all of them with --data.tables.header" if self.header else "")
                + (formats.hint(self, "--data.tables") if self.header else "")
            )
        return self[column]

    def words(self, column: str) -> list[str]:
        """A column's words, of which there is at least one.

        They are a list, a string that spells a list as JSON or Python writes it, or a string with spaces between them.

        Raises:
            UserError: If it is none of these.
        """
        value = self.value(column)
        words = self.entries(column)
        if isinstance(value, str) and not all(isinstance(word, str) for word in words or [None]):
            words = value.split()
        if not words or not all(isinstance(w, str) and w.strip() for w in words):
            raise UserError(f"{self.where}: column {column!r} has no words, but {value!r:.40}: fix or remove the row")
        return words

    def entries(self, column: str, strict: bool = False) -> Optional[list]:
        """A column's list, also if a string spells it as JSON or Python writes it; None if there is none.

        Raises:
            UserError: If a string looks like a list, but cannot be read, see `cells.as_list`.
        """
        value = self.value(column)
        try:
            return cells.as_list(value, strict)
        except ValueError as error:
            raise UserError(
                f"{self.where}: column {column!r} has {value!r:.40}, which looks like a list, but cannot be read "
                f'({error}): write it as JSON, such as ["a", "b"]'
            ) from None

    def number(self, column: str) -> float:
        """A column's number, which is finite, also as float32.

        Raises:
            UserError: If it has none.
        """
        value = self.value(column)
        try:
            return cells.number(value)
        except ValueError as error:
            reason = f" ({error})" if str(error) else ""
            raise UserError(
                f"{self.where}: column {column!r} has no number, but {value!r:.40}{reason}: fix or remove the row"
            ) from None

    def text(self, column: str) -> str:
        """A column's text, which may not be empty.

        Raises:
            UserError: If it is not there.
        """
        value = self.value(column)
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{self.where}: column {column!r} has no text, but {value!r:.40}: fix or remove the row")
        return value


def read(tables: Tables, split: str, key: Callable[[Row], str]) -> list[Row]:
    """The rows of a split, in the order of the files.

    Args:
        tables: Where they are.
        split: Its name.
        key: What of a row decides whether it is held out for validation: rows of one key stay together.

    Raises:
        UserError: Names the file and line of what cannot be read.
    """
    if not 0 <= tables.validation_fraction < 1:
        raise UserError(f"--data.tables.validation_fraction is {tables.validation_fraction}, but must be from 0 to 1")
    names = sources(tables, split)
    rows = [row for name in names for row in (of_hub if tables.hub else of_files)(name, tables)]
    if not names:
        raise UserError(f"the {split} split has no rows: name files with --data.tables.{split}")
    if not rows:
        raise UserError(f"the {split} split has no rows, as there are none in {', '.join(names)}: give other files")
    if split in ("train", "validation") and not tables.validation:
        all_ = len(rows)
        rows = [row for row in rows if held_out(key(row), tables.validation_fraction) == (split == "validation")]
        if not rows:
            raise UserError(
                f"the {split} split has no rows, as none of the {all_:,} of --data.tables.train is "
                f"{'held out' if split == 'validation' else 'left'} by --data.tables.validation_fraction "
                f"{tables.validation_fraction:g}: change that, or name files with --data.tables.validation"
            )
    return rows


def sources(tables: Tables, split: str) -> list[str]:
    """What has the rows of a split: files, folders and patterns, or the names of splits on the Hub."""
    instead = {"validation": tables.train, "predict": tables.test}
    return list(getattr(tables, split) or instead.get(split, []))


def of_hub(split: str, tables: Tables) -> Iterator[Row]:
    """The rows of a split on the Hub, where labels that are numbers with names have their names."""
    name = str(tables.hub)
    rows = formats.hub_rows(name, tables.hub_config, split, tables.hub_revision, False, "HF_HUB_OFFLINE=1")
    for number, values in rows:
        yield Row(values, f"{name} ({split}):{number}")


def of_files(pattern: str, tables: Tables) -> Iterator[Row]:
    """The rows of a file, of those in a folder, or of all that a pattern fits."""
    for _, path in expand(pattern):
        yield from of(path, tables)


def kind(path: Path, tables: Tables) -> str:
    """The format of a file, as a suffix such as `.csv`."""
    return FORMATS[tables.format] if tables.format else formats.suffixes(path)[0]


def of(path: Path, tables: Tables) -> Iterator[Row]:
    """The rows of a file. Afterwards, what was detected or replaced is printed."""
    suffix = kind(path, tables)
    if suffix not in TABLES:
        raise UserError(
            f"{path} is no table by its name: give its format with --data.tables.format csv (or tsv, jsonl)"
        )
    for option, *accepted in (
        ("header", ".csv", ".tsv", ".conll"),
        ("delimiter", ".csv", ".tsv"),
        ("quoting", ".csv", ".tsv"),
    ):
        if getattr(tables, option) is not None and suffix not in accepted:
            raise UserError(f"{path}: --data.tables.{option} is for files of the formats {', '.join(accepted)}")
    reading = formats.Reading(
        "--data.tables", tables.encoding, tables.encoding_errors, tables.delimiter, tables.quoting, tables.header
    )
    counts = formats.Counts()
    for number, values in TABLES[suffix](path, reading, counts):
        where = f"{path}:{number}"
        if suffix in (".jsonl", ".ndjson", ".json"):
            try:
                json.dumps(values, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                values = encodable(values, where, reading, counts)
        yield Row(values, where, suffix in (".csv", ".tsv", ".conll"))
    if counts.replaced_bytes:
        counts.notes.append(f"{path}: {counts.replaced_bytes:,} bytes that could not be read were replaced by U+FFFD")
    for note in counts.notes:
        rank_zero_only(print)(note)


def encodable(value: Any, where: str, reading: formats.Reading, counts: formats.Counts) -> Any:
    """JSON's data without characters that UTF-8 cannot express and no tokenizer accepts: half surrogate pairs."""
    if isinstance(value, str):
        return formats.encodable(value, where, reading, counts)
    if isinstance(value, list):
        return [encodable(item, where, reading, counts) for item in value]
    if isinstance(value, dict):
        return {key: encodable(item, where, reading, counts) for key, item in value.items()}
    return value


def held_out(key: str, fraction: float) -> bool:
    """Whether a row is one of the held-out share, which only its own key decides."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


class Examples(Dataset):
    """Tokenized rows with what is to be told of them.

    Args:
        rows: Of each row: `input_ids` and what else the tokenizer gives, lists of one length; and its targets, tensors
            of any names, such as `targets`.
        seed: Of the order and its epochs; None for evaluation: once through the rows, in `order`, the longest first.

    Items are those rows, with `id`, the number of the row. In rows that only fill up a batch, no target counts: -100,
    or NaN for numbers.
    """

    def __init__(self, rows: list[dict], seed: Optional[int]) -> None:
        self.rows, self.seed = rows, seed
        self.lengths = np.array([len(row["input_ids"]) for row in rows])
        self.longest_first = np.argsort(-self.lengths, kind="stable")
        self.order = self.longest_first

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> dict:
        if position == PADDING:
            shortest = self.rows[self.longest_first[-1]]
            return {k: none(v) if isinstance(v, torch.Tensor) else v for k, v in shortest.items()} | {"id": PADDING}
        order = self.order if self.seed is None else self.epoch(position // len(self))
        row = int(order[position % len(self)])
        return self.rows[row] | {"id": row}

    @functools.lru_cache(maxsize=2)  # noqa: B019 (as long-lived as the run)
    def epoch(self, number: int) -> np.ndarray:
        """The order of an epoch: rows of similar lengths together."""
        positions = np.arange(number * len(self), (number + 1) * len(self))
        seed = self.seed or 0
        return by_length(samples_at(positions, len(self), seed), self.lengths, seed + number, number * len(self))


def none(target: torch.Tensor) -> torch.Tensor:
    """A target of the same shape that does not count."""
    return torch.full_like(target, math.nan if target.is_floating_point() else -100)


def padded(tokenizer: "PreTrainedTokenizerFast", items: list[dict]) -> dict:
    """A batch of examples, padded to the longest.

    Returns:
        `input_ids` and what else the tokenizer gives, (B, T) int64; the targets, (B, ...), filled up with ones that
        do not count where their lengths differ; `id`, B numbers.
    """
    multiple = 8 if torch.cuda.is_available() else None  # tensor cores work on whole eights; a CPU on what there is
    targets = [key for key, value in items[0].items() if isinstance(value, torch.Tensor)]
    encodings = [{key: item[key] for key in item if key not in ("id", *targets)} for item in items]
    batch = dict(tokenizer.pad(encodings, pad_to_multiple_of=multiple, return_tensors="pt"))
    for key in targets:
        values = [item[key] for item in items]
        fill = none(values[0].new_zeros(())).item()
        batch[key] = pad_sequence(values, True, fill) if values[0].ndim else torch.stack(values)
    return batch | {"id": [item["id"] for item in items]}


class LabelledData(StreamData):
    """Base of all labelled data; a subclass says how rows become tokens and targets (`encode`), and what their labels
    are (`find_labels`).

    Args:
        tables: Files of each split.
        tokenizer: Only its `path` counts. Default: that of `model.pretrained`.
        max_length: Tokens of a row with the special ones; longer ones are cut, and counted.
        batch_size: Rows in a micro-batch of one process.
        num_workers: Processes that load batches ahead.
    """

    length_option = "max_length"

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
        self.labels: list[str] = []  # their names, in the order of their numbers
        self.labels_known = False  # whether they are those of the network that is evaluated
        self.numbers: dict[str, int] = {}  # of each label
        self.examples: dict[str, Examples] = {}
        self.inputs: list[Row] = []  # of which `predict` predicts
        self.respelled = 0  # labels of a split that are spelled in another way than the one that they are counted as
        self.stripped = 0  # labels of a split with space around them

    def key(self, row: Row) -> str:
        """What of a row is never in both training and validation, where the latter is a share of `tables.train`."""
        raise NotImplementedError

    def find_labels(self, train: list[Row]) -> None:
        """Sets `labels`, if the task has any, from the training rows, which may be none unless it is `fit`."""

    def encode(self, split: str, rows: list[Row]) -> Examples:
        """The rows of a split as tokens and targets; those of `predict` need no labels. It calls `report`."""
        raise NotImplementedError

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
        if self.tokenizer.pad_token is None:  # as GPT's published ones
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.collate = functools.partial(padded, self.tokenizer)
        # An evaluation needs the training rows only if nothing else says which labels there are.
        module = self.trainer.lightning_module
        named = stage != "fit" and (module.evaluated_checkpoint is not None or not module.keep_head)
        self.labels_known = named and bool(module.own_labels())
        needs_train = stage == "fit" or (self.tables.train and not self.labels_known)
        train = read(self.tables, "train", self.key) if needs_train else []
        self.find_labels(train)
        self.numbers = {label: number for number, label in enumerate(self.labels)}
        self.spellings = {cells.canonical(label): number for label, number in self.numbers.items()}
        needed = {"fit": ["train", "validation"], "validate": ["validation"], "test": ["test"], "predict": ["predict"]}
        for split in needed[stage]:
            if split not in self.examples:
                rows = train if split == "train" else self.read(split)
                if split == "predict":
                    self.inputs = rows
                self.respelled = self.stripped = 0
                self.examples[split] = self.encode(split, rows)
                self.report_labels(split)

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
        self.stripped += sum(map(cells.padded, values or []))
        return names

    def report_labels(self, split: str) -> None:
        """Prints how many labels of a split were changed."""
        if self.trainer.is_global_zero and self.stripped:
            print(f"{split}: space around {self.stripped:,} labels was removed")
        if self.trainer.is_global_zero and self.respelled:
            print(f"{split}: {self.respelled:,} labels are spelled in several ways (1 and 1.0), and are counted as one")

    def read(self, split: str) -> list[Row]:
        """The rows of a split."""
        return read(self.tables, split, self.key)

    def label_names(self, train: list[Row], found: set[str]) -> list[str]:
        """The labels in the order of their numbers: that of the network, if it tells the same ones already.

        Args:
            train: The training rows, if there are any.
            found: The labels in them.

        Raises:
            UserError: If neither the training split nor the network says which they are, or they do not agree where
                the network is only measured.
        """
        one = cells.merged(found)
        found = {one.get(name, name) for name in found}
        own, names = self.trainer.lightning_module.own_labels(), sorted(found)
        if train and len(names) < 2:
            raise UserError(f"the training split has {len(names)} label, but must have 2 or more")
        if not found or set(map(cells.canonical, found)) == set(map(cells.canonical, own)):
            if not own:
                raise UserError("which labels there are, the training split says: give --data.tables.train")
            return own
        if self.trainer.state.fn != "fit" and self.trainer.lightning_module.evaluated_checkpoint is None:
            if not own:
                raise UserError(
                    f"model.pretrained has no head for the labels {', '.join(names[:20])}: fit it first, or give a "
                    "--ckpt_path"
                )
            if not (self.trainer.lightning_module.keep_head and len(own) == len(names)):
                raise UserError(
                    f"model.pretrained tells the labels {', '.join(own[:20])}, but the training split has "
                    f"{', '.join(names[:20])}: leave --data.tables.train out to take the network's, or fit it first"
                )
        return names

    def number(self, row: Row, label: str, what: str = "label") -> int:
        """The number of a row's label.

        Raises:
            UserError: If it is unknown; calls it `what`.
        """
        if label not in self.numbers and (number := self.spellings.get(cells.canonical(label))) is not None:
            self.respelled += 1
            return number
        if label not in self.numbers:
            whose, advice = "the training split", "give training rows that have it"
            if self.labels_known or not self.tables.train:
                whose, advice = "the evaluated network", "evaluate a network that was trained with it"
            raise UserError(
                f"{row.where}: the {what} {label!r} is none of {whose} ({', '.join(self.labels[:20])}): "
                f"fix the row, or {advice}"
            )
        return self.numbers[label]

    def report(self, split: str, examples: list[dict], cut: int, texts: Iterable[str]) -> None:
        """Prints what a split has, how many rows of it are cut, and how many tokens of its `texts` are unknown."""
        if self.trainer.is_global_zero:
            tokens = sum(len(example["input_ids"]) for example in examples)
            unknown = self.unknown(examples)
            print(
                f"{split}: {len(examples):,} rows, {tokens:,} tokens"
                + (f", {cut:,} rows are cut to {self.block_size} tokens (data.max_length)" if cut else "")
                + about_unknown(unknown, tokens)
            )
            self.warn_of_unknown(split, unknown, tokens, texts)

    def unknown(self, examples: list[dict]) -> int:
        """How many tokens are unknown."""
        unknown = unknown_id(self.tokenizer)
        return 0 if unknown is None else sum(example["input_ids"].count(unknown) for example in examples)

    def warn_of_unknown(self, split: str, unknown: int, tokens: int, texts: Iterable[str]) -> None:
        """Prints a warning if many tokens of some texts are unknown."""
        if unknown > MANY * tokens:
            remedy = "use a --model.pretrained whose tokenizer knows such text, or fix --data.tables.encoding"
            warn_of_unknown(split, unknown, tokens, unknown_word(self.tokenizer, texts), remedy)

    def report_words(self, split: str, examples: list[dict], sentences: list[list[str]]) -> None:
        """The same of examples with `words`, see `encode_words`, and how many of these are cut off."""
        cut = [int((example["words"] < 0).sum()) for example in examples]
        self.report(split, examples, len(cut) - cut.count(0), map(" ".join, sentences))
        if self.trainer.is_global_zero and any(cut):
            words = sum(len(example["words"]) for example in examples)
            print(f"{split}: {sum(cut):,} of {words:,} words are cut off, and what they should tell counts as missed")

    def samples(self, split: str) -> Examples:
        examples = self.examples[split]
        if split != "train":
            limit = getattr(self.trainer, f"limit_{'val' if split == 'validation' else split}_batches")
            # The first of the longest batches are not like the others; of a part, the first rows are evaluated.
            part = isinstance(limit, int) or limit < 1
            examples.order = np.arange(len(examples)) if part else examples.longest_first
        return examples

    @property
    def predict_table(self) -> bool:
        """Whether the rows to predict come from CSV or TSV files, so that the predictions are wanted as such."""
        if self.tables.hub:
            return False
        paths = [path for pattern in sources(self.tables, "predict") for _, path in expand(pattern)]
        return bool(paths) and all(kind(path, self.tables) in (".csv", ".tsv") for path in paths)

    def predict_dataloader(self) -> DataLoader:
        return self.evaluation_loader("predict")

    @property
    def info(self) -> dict:
        rows = {split: len(examples) for split, examples in self.examples.items()}
        return {"tables": asdict(self.tables), "rows": rows, "labels": self.labels}

    def identity(self) -> dict:
        content = hashlib.sha256()
        for row in self.examples["train"].rows:
            fields = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in row.items()}
            content.update(repr(fields).encode())
        return {
            "training rows": content.hexdigest()[:16],
            "tokenizer": fingerprint(self.tokenizer)[:16],
            "seed_everything": self.seed,
        }
