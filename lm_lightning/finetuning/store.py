"""Tokenized examples on disk, memory-mapped: their memory does not grow with the table.

Each split of a table is a folder of the cache:

    <cache>/tables/<fingerprint>/info.json        fields with their types, counts, notes, sizes and checksums
                                 <field>.values   the values of all examples, concatenated
                                 <field>.starts   int64, where each example begins in them; not of numbers
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lm_lightning.data import cache
from lm_lightning.errors import UserError

TYPES = {"token_type_ids": "uint8"}  # of lists with few different values
NOTES = "notes"  # the key of an example that is not a part of batches: JSON


class Field(NamedTuple):
    """A key of all examples.

    Attributes:
        kind: `list` (of integers), `tensor` or `json`.
        dtype: Type of its values on disk.
        dims: Number of dimensions of a tensor: 0 or 1.
    """

    kind: str
    dtype: str
    dims: int

    @property
    def has_starts(self) -> bool:
        """Whether the number of its values differs between examples."""
        return self.kind != "tensor" or self.dims > 0


class Column:
    """The values of one field, which are appended to its files.

    Args:
        folder: Folder of the files.
        name: Name of the field.
        field: Its type.
        stack: Closes the files.
    """

    def __init__(self, folder: Path, name: str, field: Field, stack: ExitStack) -> None:
        self.name, self.field, self.digest, self.end = name, field, hashlib.blake2b(digest_size=16), 0
        self.values = stack.enter_context((folder / f"{name}.values").open("wb"))
        self.starts: Any = None
        if field.has_starts:
            self.starts = stack.enter_context((folder / f"{name}.starts").open("wb"))
            self.starts.write(bytes(8))

    def add(self, items: list[Any]) -> None:
        """Appends the values of some examples."""
        if self.field.kind == "json":
            texts = [json.dumps(item).encode() for item in items]
            sizes, data = list(map(len, texts)), b"".join(texts)
        elif self.field.kind == "list":
            sizes = list(map(len, items))
            data = np.fromiter(chain.from_iterable(items), self.field.dtype, sum(sizes)).tobytes()
        else:
            joined = torch.cat([item.reshape(-1) for item in items]).numpy()
            if str(joined.dtype) != self.field.dtype:
                raise TypeError(
                    f"{self.name} of an example is {joined.dtype}, but {self.field.dtype} in other examples"
                )
            sizes, data = [item.numel() for item in items], joined.tobytes()
        self.write(self.values, data)
        if self.starts is not None:
            ends = list(accumulate(sizes, initial=self.end))[1:]
            self.write(self.starts, np.array(ends, np.int64).tobytes())
            self.end = ends[-1] if ends else self.end

    def write(self, file: Any, data: bytes) -> None:
        """Writes bytes, which become a part of the digest."""
        file.write(data)
        self.digest.update(data)


class StoreWriter:
    """Writes examples to the files of a folder.

    Args:
        folder: The folder.
        vocabulary: Number of token ids, which determines the type of `input_ids`.
    """

    def __init__(self, folder: Path, vocabulary: int) -> None:
        self.folder, self.rows, self.stack = folder, 0, ExitStack()
        self.columns: dict[str, Column] = {}
        self.tokens = "uint16" if vocabulary <= 1 << 16 else "int32"

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.close()

    def field(self, name: str, value: Any) -> Field:
        """The type of a field, from its value in the first example."""
        if name in ("input_ids", "tokens"):
            return Field("list", self.tokens, 1)
        if name == NOTES:
            return Field("json", "uint8", 1)
        if isinstance(value, torch.Tensor) and value.ndim < 2:
            return Field("tensor", str(value.numpy().dtype), value.ndim)
        if isinstance(value, list):
            return Field("list", TYPES.get(name, "int32"), 1)
        raise TypeError(f"{name} of an example is {value!r:.80}, but must be a list of integers or a 0- or 1-D tensor")

    def column(self, name: str, field: Field) -> Column:
        """The column of a field, which is created if it does not exist."""
        if name not in self.columns:
            self.columns[name] = Column(self.folder, name, field, self.stack)
        return self.columns[name]

    def add(self, examples: list[dict[str, Any]]) -> None:
        """Appends examples, which all must have the same keys."""
        for name, value in (examples[0] if examples else {}).items():
            self.column(name, self.field(name, value)).add([example[name] for example in examples])
        self.rows += len(examples)

    def finish(self, info: dict[str, Any]) -> None:
        """Closes the files and writes `info.json`.

        Args:
            info: What it has in addition, JSON-serializable.
        """
        self.stack.close()
        fields = {name: column.field for name, column in self.columns.items()}
        content = hashlib.blake2b(digest_size=8)
        for name, column in self.columns.items():
            content.update(f"{name} {column.field} {column.digest.hexdigest()}".encode())
        info = info | {
            "rows": self.rows,
            "fields": fields,
            "content": content.hexdigest(),
            "files": cache.described(self.folder),
        }
        (self.folder / "info.json").write_text(json.dumps(info, indent=2), encoding="utf-8")


class Notes(Sequence[Any]):
    """The JSON values of a field of all examples, which are read one at a time.

    Args:
        values: Their bytes.
        starts: Where each begins, and the end.
    """

    def __init__(self, values: np.ndarray, starts: np.ndarray) -> None:
        self.values, self.starts = values, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        return json.loads(self.values[self.starts[number] : self.starts[number + 1]].tobytes())


class NotesPart(Sequence[Any]):
    """A part of the notes of all examples.

    Args:
        notes: The notes.
        key: The key or index of the part in the note of an example.
    """

    def __init__(self, notes: Notes, key: Any) -> None:
        self.notes, self.key = notes, key

    def __len__(self) -> int:
        return len(self.notes)

    def __getitem__(self, number: Any) -> Any:
        found = self.notes[number]
        return [note[self.key] for note in found] if isinstance(number, slice) else found[self.key]


class Store(Sequence[dict[str, Any]]):
    """The examples in a folder. Items are dicts as they were written, without notes.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        self.fields = {name: Field(*field) for name, field in self.info["fields"].items()}
        self.rows = self.info["rows"]
        self.values = {name: mapped(folder / f"{name}.values", field.dtype) for name, field in self.fields.items()}
        self.starts = {
            name: mapped(folder / f"{name}.starts", "int64") for name, field in self.fields.items() if field.has_starts
        }
        self.names = [name for name, field in self.fields.items() if field.kind != "json"]

    def __reduce__(self) -> tuple:  # a process to which it is sent maps the files itself
        return Store, (self.folder,)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        number = range(self.rows)[number]
        return {name: self.value(name, number) for name in self.names}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[number] for number in range(self.rows))

    def value(self, name: str, number: int) -> Any:
        """The value of a field of an example: a list of integers, or a tensor."""
        values, field = self.values[name], self.fields[name]
        if name not in self.starts:
            return torch.from_numpy(values[number : number + 1].copy()).reshape(())
        part = values[self.starts[name][number] : self.starts[name][number + 1]]
        return part.tolist() if field.kind == "list" else torch.from_numpy(part.copy())

    @cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each example, (rows,) int64."""
        return self.sizes("input_ids")

    def sizes(self, name: str) -> np.ndarray:
        """Number of values of a field of each example, (rows,) int64."""
        return np.diff(self.starts[name]) if name in self.starts else np.zeros(0, np.int64)

    def notes(self, name: str = NOTES) -> Notes:
        """The notes of all examples."""
        return Notes(self.values[name], self.starts[name])


def column(rows: Sequence[dict[str, Any]], name: str) -> torch.Tensor:
    """The values of a field that is a number in each example, (rows,), of a store or of a list of examples."""
    if isinstance(rows, Store):
        return torch.from_numpy(np.array(rows.values[name]))
    return torch.stack([row[name] for row in rows])


def sizes(rows: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    """Number of values of a field in each example, (rows,) int64, of a store or of a list of examples."""
    return rows.sizes(name) if isinstance(rows, Store) else np.array([len(row[name]) for row in rows], np.int64)


def content_of(rows: Any) -> str:
    """A fingerprint of a store, of a view of one (which has it as `store`), or of a list of examples."""
    store = getattr(rows, "store", rows)
    if isinstance(store, Store):
        return store.info["content"]
    content = hashlib.sha256()
    for row in rows:
        fields = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in row.items()}
        content.update(repr(fields).encode())
    return content.hexdigest()[:16]


def mapped(file: Path, dtype: str) -> np.ndarray:
    """The content of a file; an empty one cannot be mapped."""
    return np.asarray(np.memmap(file, dtype, "r")) if file.stat().st_size else np.empty(0, dtype)


def check(folder: Path) -> None:
    """Refuses a store that has changed since it was written.

    Raises:
        UserError: Names the file, and the folder to remove.
    """
    what, remedy = "the tokenized table", f"remove the folder {folder}, so that it is created again"
    try:
        info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        fields = {name: Field(*field) for name, field in info["fields"].items()}
        expected = {f"{name}.values" for name in fields}
        expected |= {f"{name}.starts" for name, field in fields.items() if field.has_starts}
        known = expected == info["files"].keys() and isinstance(info["rows"], int)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{what} has a damaged {folder / 'info.json'} ({error}): {remedy}") from error
    if not known:
        raise UserError(f"{folder / 'info.json'} does not describe a tokenized table: {remedy}")
    cache.check_files(folder, info["files"], what, remedy)
