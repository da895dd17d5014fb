"""Sharded checkpoints made by other people, or damaged: each is read, or refused in one sentence, and runs no code."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hostile import Guard, Payload, attack, mutations
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from lm_lightning.checkpoints.loading import load_checkpoint
from lm_lightning.errors import UserError
from lm_lightning.sharding import checkpoints


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint of one process."""
    folder = tmp_path_factory.mktemp("sharded")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        weights = {"network.a": torch.arange(6.0).reshape(2, 3), "network.b": torch.ones(4)}
        checkpoints.save({"state_dict": weights, "global_step": 1}, folder / "last.ckpt")
    finally:
        dist.destroy_process_group()
    return folder / "last.ckpt"


def changed(sharded: Path, tmp_path: Path, change) -> Path:
    """A copy of a sharded checkpoint with a changed table of contents."""
    shutil.copytree(sharded, tmp_path / "copy")
    table = tmp_path / "copy" / checkpoints.TABLE
    metadata = pickle.loads(table.read_bytes())
    change(metadata, tmp_path)
    table.write_bytes(pickle.dumps(metadata))
    return tmp_path / "copy"


def as_bytes(metadata, tmp_path: Path) -> None:
    """Calls a tensor bytes, and has them in a file of their own."""
    payload = pickle.dumps(Payload(tmp_path / "harmed"))
    (tmp_path / "copy" / "payload.distcp").write_bytes(payload)
    metadata.state_dict_metadata["weights/network.a"] = BytesStorageMetadata()
    for index, info in metadata.storage_data.items():
        if index.fqn == "weights/network.a":
            info.relative_path, info.offset, info.length = "payload.distcp", 0, len(payload)


def elsewhere(metadata, tmp_path: Path) -> None:
    """Reads a tensor from a file outside."""
    (tmp_path / "outside").write_bytes(next((tmp_path / "copy").glob("*.distcp")).read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../outside"


def huge(metadata, tmp_path: Path) -> None:
    """Claims a tensor that fits no memory."""
    metadata.state_dict_metadata["weights/network.a"].size = torch.Size([1 << 40])


def transformed(metadata, tmp_path: Path) -> None:
    """Claims a compressed part."""
    for info in metadata.storage_data.values():
        info.transform_descriptors = ["zstd"]


@pytest.mark.parametrize("change", [as_bytes, elsewhere, huge, transformed])
def test_a_checkpoints_with_a_hostile_table_is_refused(change, sharded: Path, tmp_path: Path):
    folder = changed(sharded, tmp_path, change)
    weights = {"network.a": torch.zeros(2, 3), "network.b": torch.zeros(4)}
    for read in (lambda: checkpoints.gather(folder), lambda: checkpoints.load(folder, weights, None)):
        with pytest.raises(UserError):
            read()
    assert not (tmp_path / "harmed").exists()


def test_a_checkpoints_that_is_as_it_was_written_is_read(sharded: Path):
    weights = {"network.a": torch.zeros(2, 3), "network.b": torch.zeros(4)}
    checkpoints.load(sharded, weights, None)
    assert weights["network.a"].flatten().tolist() == [0, 1, 2, 3, 4, 5] and weights["network.b"].tolist() == [1] * 4
    assert checkpoints.gather(sharded)["state_dict"].keys() == weights.keys()


def test_a_table_with_other_classes_is_refused(sharded: Path, tmp_path: Path):
    folder = changed(sharded, tmp_path, lambda metadata, _: None)
    (folder / checkpoints.TABLE).write_bytes(pickle.dumps(Payload(tmp_path / "harmed")))
    with pytest.raises(UserError, match="table of contents"):
        checkpoints.gather(folder)
    assert not (tmp_path / "harmed").exists()


@mutations(1000)
def test_damaged_sharded_checkpoints(guard: Guard, tmp_path: Path, seeds: range):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        weights = {"network.a": torch.arange(6.0).reshape(2, 3), "network.b": torch.ones(4)}
        checkpoint = {"state_dict": weights, "global_step": 1, "network": {}}
        checkpoints.save(checkpoint, tmp_path / "original" / "last.ckpt")
    finally:
        dist.destroy_process_group()
    attack(tmp_path / "original" / "last.ckpt", load_checkpoint, seeds, guard, tmp_path)
    attack(tmp_path / "original" / "last.ckpt", checkpoints.gather, seeds[: len(seeds) // 2], guard, tmp_path)
