"""Filters in commands: which results are cached, what a kill leaves, and that several processes give the same."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import yaml
from conftest import command, paragraphs
from reading import Reader, under

from lm_lightning.data import documents
from lm_lightning.data.corpus import Corpus, Piece, read
from lm_lightning.data.filter import Document, Filter
from lm_lightning.data.filtering import filter_corpus
from lm_lightning.errors import UserError
from lm_lightning.filters.duplicates import ExactDuplicates
from lm_lightning.filters.near_duplicates import NearDuplicates
from lm_lightning.filters.overlap import SplitOverlap
from lm_lightning.filters.personal import MaskPersonalData
from lm_lightning.filters.quality import GopherQuality

FATAL = '''
import os, signal
from lm_lightning.data.filter import Filter, Marked

class Fatal(Filter):
    """Marks long documents; kills the process if `KILL` is set."""

    def __init__(self, most: int = 200, **options):
        super().__init__(**options)
        self.most = most

    def judge(self, document):
        if "KILL" in os.environ and document.number == 200:
            os.kill(os.getpid(), signal.SIGKILL)
        return Marked("long") if len(document.text) > self.most else None
'''


def filtered(cache: Path) -> dict[str, str]:
    """The description of each filtered corpus in a cache."""
    return {path.parent.name: path.read_text() for path in cache.glob("filtered/*/info.json")}


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_command_leaves_nothing_that_counts_as_complete(tmp_path: Path, corpus_file: Path, cli, monkeypatch):
    (tmp_path / "own_filters.py").write_text(FATAL)
    own = {"class_path": "own_filters.Fatal"}
    corpus = {"paths": [str(corpus_file)], "filters": [{"class_path": "ExactDuplicates"}, own]}
    options = {"corpus": corpus, "tokenizer": {"algorithm": "bytes"}, "cache_dir": str(tmp_path / "cache")}
    recipe = tmp_path / "data.yaml"
    recipe.write_text(yaml.safe_dump({"data": {"class_path": "PretrainingData", "init_args": options}}))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    killed = command("prepare", "--config", recipe, env=os.environ | {"KILL": "1"})
    assert killed.returncode == -signal.SIGKILL
    partial = list((tmp_path / "cache" / "filtered").iterdir())
    assert [path.suffix for path in partial] == [".partial"] and not filtered(tmp_path / "cache")
    monkeypatch.syspath_prepend(tmp_path)
    out = cli("prepare", "--config", recipe)
    assert "ExactDuplicates" in out and "marked" in out and not partial[0].exists()
    before = filtered(tmp_path / "cache")
    assert len(before) == 1
    out = cli("prepare", "--config", recipe)
    assert "marked" not in out and "filters: 500 of 500 documents are left" in out  # cached
    own["init_args"] = {"most": 100}
    recipe.write_text(yaml.safe_dump({"data": {"class_path": "PretrainingData", "init_args": options}}))
    assert "marked" in cli("prepare", "--config", recipe)
    assert len(filtered(tmp_path / "cache")) == 2
    sys.modules.pop("own_filters")


@pytest.mark.slow
def test_the_number_of_processes_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(documents, "ALONE", 0)
    monkeypatch.setattr(documents, "BATCH", 2000)
    texts = [text * 4 for text in paragraphs(80)]
    texts += [text.replace("the", "a", 1) for text in texts[:20]] + texts[20:30] + [f"{texts[0]} mail@example.org"]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    results = []
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        filters = [MaskPersonalData(), ExactDuplicates(), GopherQuality(), NearDuplicates(), SplitOverlap()]
        pieces = read(Corpus([str(tmp_path / "text.jsonl")], validation_fraction=0.2), tmp_path)
        filter_corpus(filters, pieces, None, number, folder)
        results.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert results[0] == results[1]
    report = json.loads(results[0]["info.json"])
    assert [entry["removed"]["documents"] > 0 for entry in report["filters"][1:]] == [True] * 4


class Dies(Filter):
    """Kills the process in which it is."""

    def judge(self, document: Document) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_process_ends_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(documents, "ALONE", 0)
    with pytest.raises(UserError, match="a process that filters was killed"):
        filter_corpus([Dies()], [Piece("train", "a", "text", True)], None, 2, tmp_path)


@under("docs/filters.md", "Filters")
def test_the_recipe(reader: Reader, typed: list[list[str]]):
    fitted, prepared = typed
    reader.type(fitted)
    info = json.loads((reader.fitted[-1] / "data.json").read_text())
    names = [entry["filter"] for entry in info["filters"]]
    assert names == ["ExactDuplicates", "GopherQuality", "GopherRepetition", "Language", "MaskPersonalData"] + [
        "NearDuplicates",
        "SplitOverlap",
    ]
    assert "documents" in reader.type(prepared)
