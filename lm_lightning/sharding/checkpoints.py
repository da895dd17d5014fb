"""Sharded checkpoints: folders into which each process writes its shard of the tensors.

The tensors are saved by `torch.distributed.checkpoint`, so that a different number of processes can read the parts that
they need. Everything else is in `meta.pt`. Reading these files runs no code.
"""

import contextlib
import io
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata

from lm_lightning.checkpoints.files import OLD, check_loads, remove_partial, write_error
from lm_lightning.console import printable
from lm_lightning.errors import UserError, one_line
from lm_lightning.files import PARTIAL, checksum, put, remove, sync
from lm_lightning.security.untrusted import plain_name, refuse_expanding_zip
from lm_lightning.sharding import compat

META = "meta.pt"  # Lightning's name, by which it recognizes such a folder
TABLE = ".metadata"  # PyTorch's name of the table of contents
METADATA = "torch.distributed.checkpoint.metadata"
Names = list[list[str]]  # of the parameters of each group of an optimizer


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a sharded checkpoint."""
    return (path / META).is_file()


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint of a sharded network; all processes call it together.

    Args:
        checkpoint: Lightning's checkpoint; the keys of the optimizer's state are names of parameters.
        path: Folder to write. An existing checkpoint of that name is replaced when the new one is complete.

    Raises:
        UserError: If the disk is full, or the checkpoint contains something that could not be loaded again.
    """
    weights, states = checkpoint.pop("state_dict"), checkpoint.pop("optimizer_states", [])
    state = states[0] if states else None
    tensors, partial = flat(weights, state), path.with_name(path.name + PARTIAL)
    first = torch.distributed.get_rank() == 0
    if first:
        remove_partial(path.parent)
    torch.distributed.barrier()
    try:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(partial, overwrite=True))
        own = [*partial.glob(f"__{torch.distributed.get_rank()}_*.distcp"), *([partial / TABLE] if first else [])]
        sums: list[dict[str, int]] = [{}] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(sums, {file.name: checksum(file) for file in own})
        if first:
            groups = None if state is None else state["param_groups"]
            all_sums = {name: value for part in sums for name, value in part.items()}
            buffer = io.BytesIO()
            torch.save(checkpoint | {"optimizer_groups": groups, "sums": all_sums}, buffer)
            with open(partial / META, "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            check_loads(partial / META, path)
            sync(partial)
            put(partial, path, path.with_name(path.name + OLD))
    except (dcp.CheckpointException, OSError) as error:
        # (All processes get the same type of error, whichever of them has failed.)
        failures = error.failures.values() if isinstance(error, dcp.CheckpointException) else [(error, None)]
        reason = next((failure for failure, _ in failures if isinstance(failure, OSError)), None)
        if reason is None:
            raise
        if first:
            remove(partial)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        raise write_error(path, reason, f"more than {size:,}") from error
    finally:
        if first:
            remove(partial)
    torch.distributed.barrier()


def damaged(path: Path) -> Optional[str]:
    """The name of a file that has changed since the checkpoint was written; None if none has."""
    with zipfile.ZipFile(path / META) as file:
        refuse_expanding_zip(file, path / META)
        if file.testzip():  # torch.load does not verify checksums
            return META
    for name, value in meta(path)["sums"].items():
        file_path = path / plain_name(name, f"a file name in {path / META}")
        if not file_path.is_file() or checksum(file_path) != value:
            return name
    return None


def meta(path: Path) -> dict[str, Any]:
    """The content of a checkpoint without its tensors."""
    return torch.load(path / META, map_location="cpu", weights_only=True)


def load(path: Path, weights: dict[str, Any], state: Optional[dict[str, Any]]) -> None:
    """Loads a checkpoint in place into a sharded network and its optimizer; all processes call it together.

    Args:
        path: Folder of the checkpoint.
        weights: State dict of the network, which may be sharded in any way.
        state: State of the optimizer by names of parameters; its groups get the settings in the checkpoint. None to
            load only the network.
    """
    with readable(path):
        reader = Reader(path)
        reader.read_metadata()  # raises its own error, which `dcp.load` would wrap
        dcp.load(flat(weights, state), storage_reader=reader)
    if state is not None:
        saved = {name: group for group in meta(path)["optimizer_groups"] for name in group["params"]}
        for group in state["param_groups"]:
            group.update({k: v for k, v in saved[group["params"][0]].items() if k != "params"})


def gather(path: Path) -> dict[str, Any]:
    """Assembles a checkpoint with full tensors in memory, as a single process would have saved it."""
    with readable(path):
        reader = Reader(path)
        tensors = {
            key: torch.empty(m.size, dtype=m.properties.dtype)
            for key, m in reader.read_metadata().state_dict_metadata.items()
            if isinstance(m, TensorStorageMetadata)  # (as all are)
        }
        dcp.load(tensors, storage_reader=reader, no_dist=True)
        checkpoint = meta(path)
        weights: dict[str, Tensor] = {}
        state: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, name, *rest = key.split("/")
            if kind == "weights":
                weights[name] = tensor
            else:
                state.setdefault(name, {})[rest[0]] = tensor
        groups = checkpoint.pop("optimizer_groups")
        optimizers = [] if groups is None else [numbered({"state": state, "param_groups": groups})]
    return checkpoint | {"state_dict": weights, "optimizer_states": optimizers}


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Converts any error in the block to a UserError that names the checkpoint.

    (`dcp.CheckpointException` is not a subclass of `Exception`.)
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, dcp.CheckpointException) as error:  # damaged files make torch and pickle raise anything
        cause = next(iter(error.failures.values()))[0] if isinstance(error, dcp.CheckpointException) else error
        reason = one_line(cause, 300)
        raise UserError(f"the checkpoint {path} is damaged or cannot be read ({reason}): use another one") from error


def flat(weights: dict[str, Any], state: Optional[dict[str, Any]]) -> dict[str, Tensor]:
    """The tensors of a network and its optimizer as a flat dict."""
    tensors = {f"weights/{name}": tensor for name, tensor in weights.items()}
    for name, values in (state or {"state": {}})["state"].items():
        tensors |= {f"optimizer/{name}/{key}": value for key, value in values.items()}
    return tensors


def numbered(state: dict[str, Any]) -> dict[str, Any]:
    """Converts the state of an optimizer from names of parameters to PyTorch's numbers."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    return {
        "state": {numbers[name]: values for name, values in state["state"].items()},
        "param_groups": [g | {"params": [numbers[name] for name in g["params"]]} for g in state["param_groups"]],
    }


def named(state: dict[str, Any], names: Names) -> dict[str, Any]:
    """Converts the state of an optimizer from PyTorch's numbers of parameters to their names."""
    name_of = {
        number: name for group, own in zip(state["param_groups"], names) for number, name in zip(group["params"], own)
    }
    return {
        "state": {name_of[number]: values for number, values in state["state"].items()},
        "param_groups": [group | {"params": own} for group, own in zip(state["param_groups"], names)],
    }


class Reader(dcp.FileSystemReader):
    """Reads the table of contents, which is a pickle, but allows only the classes that a table consists of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path)
        with readable(path / TABLE), open(path / TABLE, "rb") as file:
            metadata = TableUnpickler(file).load()
            check_table(metadata, path)
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def check_table(metadata: Any, path: Path) -> None:
    """Refuses a table of contents with anything other than tensors in files of its own folder.

    `torch.distributed.checkpoint` unpickles all entries of type bytes without restrictions, and does not check file
    names.

    Raises:
        UserError: Names the entry.
    """
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise UserError(f"{path / TABLE} is not the table of contents of a checkpoint")
    room: dict[str, int] = {}  # total size in bytes of the files with each tensor's parts
    for index, info in metadata.storage_data.items():
        if not isinstance(index, MetadataIndex) or not isinstance(info, compat.storage_info()):
            raise UserError(f"{path / TABLE} has an entry that is not a part of a tensor: it is damaged or was changed")
        file = path / plain_name(info.relative_path, f"a file name in {path / TABLE}")
        size = file.stat().st_size if file.is_file() and not file.is_symlink() else -1
        if min(info.offset, info.length) < 0 or info.offset + info.length > size:
            raise UserError(f"{path / TABLE} refers to bytes beyond the end of {file.name}: the checkpoint is damaged")
        if info.transform_descriptors:
            raise UserError(
                f"{path / TABLE} has a transformed part, which lm_lightning never writes: use another checkpoint"
            )
        room[index.fqn] = room.get(index.fqn, 0) + info.length
    for name, tensor in metadata.state_dict_metadata.items():
        if not isinstance(tensor, TensorStorageMetadata) or not isinstance(tensor.properties.dtype, torch.dtype):
            raise UserError(
                f"{path / TABLE} lists {printable(str(name))[:100]}, which is not a tensor and could run code when it "
                "is read: do not use this checkpoint"
            )
        if tensor.size.numel() * tensor.properties.dtype.itemsize > room.get(name, 0):
            raise UserError(f"{path / TABLE} lists {printable(str(name))[:100]} as larger than its file: it is damaged")


class TableUnpickler(pickle.Unpickler):
    """Loads only the classes that a table of contents consists of."""

    def find_class(self, module: str, name: str) -> Any:
        # Other modules are not even imported, as an import runs code.
        modules = (METADATA, "torch", compat.LAYOUT[0], compat.STORAGE_INFO[0])
        known = module in (*modules, "pathlib", "collections") and "." not in name
        found = super().find_class(module, name) if known else None
        allowed = (
            (module == METADATA and isinstance(found, type) and found.__module__ == METADATA)
            or (module, name) in (("torch", "Size"), ("torch", "device"), compat.STORAGE_INFO, compat.LAYOUT)
            or (module == "torch" and isinstance(found, (torch.dtype, torch.memory_format)))
            or (module, name) in (("pathlib", "PosixPath"), ("pathlib", "WindowsPath"), ("collections", "OrderedDict"))
        )
        if not allowed:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint's table of contents")
        return found
