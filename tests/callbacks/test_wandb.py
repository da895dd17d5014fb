"""W&B: runs that are written offline, read back and compared with what was logged."""

import csv
import json
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
ROOT = Path(__file__).parent.parent.parent
OVERLAY = ROOT / "configs" / "callbacks" / "wandb.yaml"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """No key, no settings and no network."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_MODE", "offline")


class Part:
    """What one start of a run has written: a log in LevelDB's format, of protobuf records."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (file,) = folder.glob("*.wandb")
        records: dict[str, list] = {}
        for record in self.records(file.read_bytes()):
            kind = record.WhichOneof("record_type")
            records.setdefault(kind, []).append(getattr(record, kind))
        self.of, self.run = records, records["run"][0]
        self.rows = [values(record.item) for record in records.get("history", ())]
        self.config: dict = {}
        for record in [self.run.config, *records.get("config", ())]:
            self.config |= values(record.update)

    def records(self, data: bytes) -> Iterator:
        position, parts = 7, b""  # after the file's header
        while position + 7 <= len(data):
            rest = 2**15 - position % 2**15
            if rest < 7:  # the end of a block
                position += rest
                continue
            size, kind = struct.unpack("<4xHB", data[position : position + 7])
            parts += data[position + 7 : position + 7 + size]
            position += 7 + size
            if kind in (1, 4):  # whole, or the last part
                record = pb.Record()
                record.ParseFromString(parts)
                parts = b""
                yield record

    def table(self, name: str) -> dict:
        (row,) = [row for row in self.rows if name in row][-1:]
        return json.loads((self.folder / "files" / row[name]["path"]).read_text())


def values(items) -> dict:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def parts(run: Path) -> list[Part]:
    return [Part(folder) for folder in sorted((run / "wandb").glob("*run-*-*"), key=os.path.getmtime)]


def logged(run: Path) -> list[dict[str, float]]:
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: float(value) for name, value in row.items() if value and name != "step"} for row in rows]


def test_an_offline_run_has_all_that_was_logged(fit, capsys):
    flags = ("--trainer.logger.project", "apples", "--trainer.logger.entity", "fruit", "--trainer.logger.notes", "n.b.")
    run = fit("--config", OVERLAY, *flags, "--trainer.logger.tags", "[red, small]")
    (part,) = parts(run)
    assert (part.run.project, part.run.entity, part.run.notes, list(part.run.tags)) == (
        *("apples", "fruit", "n.b."),
        ["red", "small"],
    )
    own = ("_step", "_runtime", "_timestamp", "trainer/global_step", "trainer/part")
    rows = [{name: value for name, value in row.items() if name not in own} for row in part.rows]
    assert len(rows) == 12 and rows == [pytest.approx(row) for row in logged(run)]
    assert [row["trainer/global_step"] for row in part.rows] == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10]
    assert {"train/tokens_per_second", "train/memory"} <= rows[0].keys()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert {name: part.config[name] for name in config} == config
    assert any("cpu" in item.key for item in part.of["stats"][0].item)  # of the machine
