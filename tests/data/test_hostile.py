"""Files that would fill the memory or the disk are refused in one sentence."""

import gzip
import json
import shutil
from pathlib import Path

import pytest

from lm_lightning.data import reading, tokenizer
from lm_lightning.data.formats import Csv, Format, Jsonl, Tsv
from lm_lightning.data.reading import ReadOptions, ReadReport
from lm_lightning.data.tokenizer import Tokenizer
from lm_lightning.errors import UserError

OPTIONS = ReadOptions("--data.tables")


def test_a_compressed_file_that_expands_without_bound_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(reading, "ALWAYS_ALLOWED", 1 << 20)
    file = tmp_path / "rows.jsonl.gz"
    with gzip.open(file, "wb") as stream:
        for _ in range(32):
            stream.write(b" " * (1 << 20))  # one line without an end
    with pytest.raises(UserError, match="rows.jsonl.gz expands to more than 200 times its size"):
        list(Jsonl().rows(file, OPTIONS, ReadReport()))
    text = json.dumps({"text": "a b c " * 40}) + "\n"
    with gzip.open(file, "wt") as stream:
        stream.write(text * 100)
    assert len(list(Jsonl().rows(file, OPTIONS, ReadReport()))) == 100


@pytest.mark.parametrize("form", [Jsonl(), Csv(), Tsv()], ids=lambda form: form.name)
def test_a_row_without_end_is_refused(form: Format, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(reading, "LONGEST_ROW", 10_000)
    file = tmp_path / f"rows.{form.name}"
    file.write_text("text\n" + "a" * 20_000 + "\n" if form.name != "jsonl" else "a" * 20_000)
    with pytest.raises(UserError, match=r"rows\.\w+:\d: the line has more than 10,000 characters"):
        list(form.rows(file, OPTIONS, ReadReport()))


def test_a_cell_that_swallows_the_file_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(reading, "LONGEST_ROW", 10_000)
    file = tmp_path / "rows.csv"
    file.write_text('text\n"' + "an open quote\n" * 1000)
    with pytest.raises(UserError, match="rows.csv:2: .*field larger than field limit"):
        list(Csv().rows(file, OPTIONS, ReadReport()))


def test_an_id_that_needs_a_huge_vocabulary_is_refused(tmp_path: Path):
    made = tokenizer.train(Tokenizer(algorithm="bytes", vocab_size=300), iter(()), "gpt")
    made.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"]["!"] = 2**31 - 2
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="one of them has the id 2,147,483,646"):
        tokenizer.load(str(tmp_path))
    shutil.rmtree(tmp_path)
