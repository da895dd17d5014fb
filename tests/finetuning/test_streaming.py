"""Tables are read as streams and tokenized once: examples, reports and refusals are those of all rows at once."""

import gc
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import paragraphs

from lm_lightning.data.tokenizer import Tokenizer, train
from lm_lightning.errors import UserError
from lm_lightning.finetuning import encoding
from lm_lightning.finetuning.data import LabelledData
from lm_lightning.finetuning.examples import collate
from lm_lightning.finetuning.tables import Row, Tables


class Words(LabelledData):
    """Texts with the name of a label and a target for each word; texts with a number below `least` are omitted."""

    def __init__(self, least: int = 0, **options) -> None:
        super().__init__(**options)
        self.least = least

    def key(self, row: Row) -> str:
        return row.text("text")

    def labels_in(self, row: Row) -> list[str]:
        return [row.text("label")]

    def find_labels(self, found) -> None:
        self.labels = self.label_names(found)

    def encode(self, split: str, rows: list[Row]) -> list[dict]:
        self.seen = [*getattr(self, "seen", ()), sum(isinstance(each, Row) for each in gc.get_objects())]
        kept = [row for row in rows if int(row.text("text").split()[0]) >= self.least]
        self.counts.add("omitted", len(rows) - len(kept))
        examples = self.tokenize([row.text("text") for row in kept])
        for example, row in zip(examples, kept):
            example["targets"] = torch.tensor(self.label_id(row, row.text("label")))
            example["words"] = torch.arange(len(row.text("text").split()), dtype=torch.float32)
        return examples

    def report(self, split, examples, counts) -> None:
        super().report(split, examples, counts)
        self.print(f"{split}: {counts['omitted']} omitted")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    train(Tokenizer(algorithm="wordpiece", vocab_size=150), paragraphs(40), "bert").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [{"text": text, "label": f" {'ab'[i % 2]}"} for i, text in enumerate(paragraphs(40))]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def made(table: Path, tokenizer: str, **options) -> Words:
    """The data after `setup`."""
    options = {"max_length": 24, "cache_dir": str(table.parent / "cache")} | options
    data = Words(tables=Tables(str(table), str(table)), tokenizer=Tokenizer(path=tokenizer), **options)
    data.trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(own_labels=lambda: []), state=SimpleNamespace(fn="fit"), is_global_zero=True
    )
    data.setup("fit")
    return data


def test_rows_are_read_and_tokenized_in_parts_and_once(table: Path, tokenizer: str, monkeypatch, capsys):
    data = made(table, tokenizer, least=3)
    at_once, report = list(data.examples["train"].rows), capsys.readouterr().out
    assert "train: 37 rows" in report and "are truncated to 24 tokens" in report and "train: 3 omitted" in report
    shutil.rmtree(table.parent / "cache")
    monkeypatch.setattr(encoding, "ROWS", 7)
    data = made(table, tokenizer, least=3)
    assert capsys.readouterr().out == report and len(data.seen) == 12 and max(data.seen) < 16
    parts = data.examples["train"].rows
    assert [str(row) for row in parts] == [str(row) for row in at_once]  # with types
    batch = collate(data.tokenizer, [data.examples["train"][position] for position in (5, 40, -1)])
    assert batch["input_ids"].dtype == batch["targets"].dtype == torch.int64 and batch["targets"][2] == -100
    monkeypatch.setattr(Words, "encode", lambda *_: pytest.fail("the cache has the examples"))
    again = made(table, tokenizer, least=3, batch_size=5)
    assert capsys.readouterr().out == report and again.identity() == data.identity()


def test_whatever_changes_the_examples_tokenizes_again(table: Path, tokenizer: str, monkeypatch):
    first = made(table, tokenizer)
    others = [made(table, tokenizer, least=3), made(table, tokenizer, max_length=20)]
    table.write_text(table.read_text().replace("ship", "boat") + table.read_text().splitlines()[0] + "\n")
    others.append(made(table, tokenizer))
    for name, value in (("model_input_names", ["input_ids", "attention_mask"]), ("truncation_side", "left")):
        copy = Path(shutil.copytree(tokenizer, table.parent / name))
        settings = json.loads((copy / "tokenizer_config.json").read_text())
        (copy / "tokenizer_config.json").write_text(json.dumps(settings | {name: value}))
        assert hasattr(made(table, str(copy)), "seen"), name
    monkeypatch.setattr(encoding, "code", lambda *_: "changed")
    assert hasattr(made(table, tokenizer), "seen")
    assert len({data.identity()["training rows"] for data in (first, *others)}) == 4


def test_a_changed_cache_is_refused(table: Path, tokenizer: str):
    data = made(table, tokenizer)
    file = data.examples["train"].rows.folder / "targets.values"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match="targets.values of the tokenized table has changed .* remove the folder"):
        made(table, tokenizer)


def test_a_row_that_cannot_be_read_leaves_nothing_in_the_cache(table: Path, tokenizer: str):
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines[:30], '{"text": " ", "label": "a"}', *lines[30:]]))
    for _ in range(2):
        with pytest.raises(UserError, match="rows.jsonl:31: column 'text' is ' ', but must be text"):
            made(table, tokenizer)
    assert [path.name for path in (table.parent / "cache" / "tables").iterdir() if "partial" in path.name] == []
