"""Reads the tables of a task as a stream, and converts them once to examples in the cache, see `store`.

The name of the folder is a fingerprint of everything that determines the examples: the content of the files, the
options of the task, its code, the labels and the tokenizer. In all functions, `data` is a `LabelledData`.
"""

import hashlib
import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import transformers
from lightning.pytorch import LightningDataModule

from lm_lightning.data import cache as cached
from lm_lightning.data import formats
from lm_lightning.data.reading import ReadReport
from lm_lightning.data.shards import fingerprint
from lm_lightning.data.tokenizer import fingerprint as tokenizer_fingerprint
from lm_lightning.data.tokenizer import vocabulary
from lm_lightning.finetuning import store
from lm_lightning.finetuning.counts import Counts
from lm_lightning.finetuning.store import Field, Store, StoreWriter
from lm_lightning.finetuning.tables import Row

FORMAT = 1  # part of every fingerprint: increase it when the meaning of the files changes
ROWS = 4096  # rows that are tokenized at once; fewer if they have more than CHARACTERS
CHARACTERS = 1 << 22
INPUTS = "inputs"  # name of the notes with the rows of `predict`
READING = ("header", "delimiter", "quoting", "encoding", "encoding_errors", "validation_fraction")  # options of tables


class Encoded(NamedTuple):
    """A split whose rows have been converted to examples.

    Attributes:
        examples: The examples: a `Store`, or a list.
        counts: What was counted meanwhile.
        notes: What was detected or replaced in the files.
        inputs: The rows, for `predict`; otherwise empty.
    """

    examples: Sequence[dict[str, Any]]
    counts: Counts
    notes: list[str]
    inputs: Sequence[Row]


class Rows(store.Notes):
    """The rows of `predict`: their values, if the predictions are also written as a table, and where each was."""

    def __init__(self, examples: Store) -> None:
        super().__init__(examples.values[INPUTS], examples.starts[INPUTS])

    def __getitem__(self, number: Any) -> Any:
        found = super().__getitem__(number)
        return [Row(*row) for row in found] if isinstance(number, slice) else Row(*found)


def encoded(data: Any, split: str) -> Encoded:
    """The examples of a split, from the cache, where they are written first if it does not have them.

    Several processes can call this at once: the first one does the work, and the others wait for it.

    Raises:
        UserError: If a row cannot be read or converted; names the file and line.
    """
    cache = cached.folder_of(data.cache_dir)
    tokens = [
        tokenizer_fingerprint(data.tokenizer),
        data.tokenizer.chat_template,
        data.tokenizer.padding_side,
        data.tokenizer.truncation_side,
        data.tokenizer.model_input_names,
        transformers.__version__,
        tokenizers.__version__,
    ]
    folder = cache / "tables" / key(data, split, data.labels, data.encoding_options(split), *tokens)
    cached.make_once(folder, cache, f"tokenizing the {split} split", lambda partial: write(data, split, partial))
    store.check(folder)
    examples = Store(folder)
    inputs: Sequence[Row] = Rows(examples) if INPUTS in examples.fields else []
    return Encoded(examples, Counts(examples.info["counts"]), examples.info["notes"], inputs)


def in_memory(data: Any, split: str) -> Encoded:
    """The same for a task whose examples are not in the cache; its `encode` is called once, with all rows."""
    report, data.counts, data.first_row = ReadReport(), Counts(), 0
    rows = list(data.read(split, report))
    examples = data.encode(split, rows)
    data.counts.add("rows", len(rows))
    data.check_counts(split, data.counts)
    return Encoded(examples, data.counts, report.notes, rows if split == "predict" else [])


def write(data: Any, split: str, folder: Path) -> None:
    """Reads the rows of a split, and writes their examples to a folder."""
    report, rows, data.counts = ReadReport(), 0, Counts()
    with StoreWriter(folder, vocabulary(data.tokenizer)) as writer:
        inputs = writer.column(INPUTS, Field("json", "uint8", 1)) if split == "predict" else None
        table = inputs is not None and data.predict_table
        for chunk in chunks(progress(data, split, report, f"tokenize {split}")):
            data.first_row = rows
            writer.add(data.encode(split, chunk))
            if inputs is not None:
                inputs.add([[dict(row) if table else {}, row.where] for row in chunk])
            rows += len(chunk)
        data.counts.add("rows", rows)
        data.check_counts(split, data.counts)
        writer.finish({"split": split, "counts": data.counts.saved(), "notes": report.notes})


def labels(data: Any) -> dict[str, str]:
    """The names of the labels in the training rows, each with the place of the first row that has it."""
    cache = cached.folder_of(data.cache_dir)
    folder = cache / "tables" / key(data, "train", "labels")

    def make(partial: Path) -> None:
        found: dict[str, str] = {}
        for row in progress(data, "train", ReadReport(), "find labels"):
            for name in data.labels_in(row):
                found.setdefault(name, row.where)
        (partial / "labels.json").write_text(json.dumps(found), encoding="utf-8")

    cached.make_once(folder, cache, "reading the labels of the train split", make)
    return json.loads((folder / "labels.json").read_text(encoding="utf-8"))


def key(data: Any, split: str, *parts: Any) -> str:
    """The name of the folder for what is made of the rows of a split."""
    cache = cached.folder_of(data.cache_dir)
    files = [[str(path), cached.content(path, cache)] for path in data.files(split)]
    reading = {name: getattr(data.tables, name) for name in READING}
    given = formats.identity(data.tables.format)
    classes = [type(data.tables.format)] if isinstance(data.tables.format, formats.Format) else []
    held_out = split in ("train", "validation") and data.holds_out()
    return fingerprint(
        [FORMAT, split, held_out, files, data.hub_content(split, cache), reading, given],
        [f"{type(data).__module__}.{type(data).__qualname__}", code(type(data), *classes), data.options],
        parts,
    )


def chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Groups rows to lists of limited size."""
    chunk, size = list[Row](), 0
    for row in rows:
        chunk.append(row)
        size += characters(row)
        if len(chunk) == ROWS or size >= CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def characters(value: Any) -> int:
    """About the number of characters of a value of a table."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(characters, value.values()))
    return sum(map(characters, value)) if isinstance(value, (list, tuple)) else 8


def progress(data: Any, split: str, report: ReadReport, title: str) -> Iterator[Row]:
    """The rows of a split, with a progress bar that shows the speed and the time left."""
    from tqdm import tqdm

    total = sum(path.stat().st_size for path in data.files(split)) or None
    unit: dict[str, Any] = {"unit": " rows"} if total is None else {"unit": "B", "unit_scale": True, "total": total}
    with tqdm(desc=title, leave=False, disable=None, **unit) as bar:
        for number, row in enumerate(data.read(split, report)):
            if total is None:
                bar.update()
            elif number % 256 == 0:
                bar.update(report.read_bytes() - bar.n)
            yield row


def plain(value: Any) -> Any:
    """A value as JSON-serializable data; objects by their class and attributes."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (Path, re.Pattern, type)):
        return repr(value)
    return [type(value).__qualname__, plain(getattr(value, "__dict__", {}))]


def code(*classes: type) -> str:
    """A hash of the source code of classes: all modules in the folders of the classes and of their base classes."""
    folders = set()
    for own in (base for each in classes for base in each.__mro__):
        if own in LightningDataModule.__mro__:
            continue
        try:
            folders.add(Path(inspect.getfile(own)).parent)
        except (OSError, TypeError):  # defined interactively
            continue
    digest = hashlib.sha256()
    for file in sorted(file for folder in folders for file in folder.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
