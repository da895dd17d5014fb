"""Splits without rows, and damaged or unreadable files, are refused with the remedy for their own case."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import needs, paragraphs

from lm_lightning.checkpoints.loading import load_checkpoint
from lm_lightning.data.corpus import Corpus
from lm_lightning.data.pretraining import PretrainingData
from lm_lightning.data.tokenizer import Tokenizer
from lm_lightning.errors import UserError
from lm_lightning.finetuning.tables import Tables, read_files, read_split


@pytest.mark.parametrize(
    ("tables", "split", "message"),
    [
        ({}, "train", "the train split has no rows: give files with --data.tables.train"),
        ({"train": "rows.csv"}, "test", "the test split has no rows: give files with --data.tables.test"),
        (
            {"train": "rows.csv", "validation": "empty.csv"},
            "validation",
            "the validation split has no rows, as there are none in empty.csv: give other files",
        ),
        ({"train": "nothing.csv"}, "validation", "the validation split has no rows, as there are none in nothing.csv"),
        (
            {"train": "rows.csv", "validation_fraction": 0.0},
            "validation",
            "validation_fraction 0, none of the 3 rows of --data.tables.train is held out: change it",
        ),
        (
            {"train": "rows.csv", "validation_fraction": 0.999999},
            "train",
            "validation_fraction 0.999999, none of the 3 rows of --data.tables.train is left: change it",
        ),
        ({"train": "rows.csv", "validation_fraction": 1.0}, "train", "validation_fraction is 1.0, but must be from 0"),
        ({"train": "rows.csv", "validation_fraction": -0.1}, "train", "validation_fraction is -0.1, but must be"),
    ],
)
def test_a_split_without_rows(tmp_path: Path, monkeypatch, tables: dict, split: str, message: str):
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("text,label\na,x\nb,y\nc,x\n")
    Path("empty.csv").write_text("text,label\n")
    Path("nothing.csv").write_text("")
    with pytest.raises(UserError, match=message):
        list(read_split(Tables(**tables), split, lambda row: row.text("text")))


def test_a_missing_column_is_named_with_options_of_its_format(tmp_path: Path):
    for name, content in (("a.csv", "body\nx\n"), ("a.jsonl", '{"body": "x"}'), ("a.conll", "x\n")):
        (tmp_path / name).write_text(content)
        (row,) = read_files(str(tmp_path / name), Tables())
        with pytest.raises(
            UserError,
            match="there is no column 'text'; .*: set the option of --data.columns that has the value 'text' to one",
        ) as caught:
            row.text("text")
        assert ("--data.tables.header" in str(caught.value)) == (name != "a.jsonl")


def test_a_corpus_without_text_for_validation(tmp_path: Path):
    (tmp_path / "train.txt").write_text("\n\n".join(paragraphs(50)))
    (tmp_path / "held.txt").write_text("\n")
    for held, remedy in (
        ("held.txt", "name other files with"),
        (None, "increase --data.corpus.validation_fraction .or give"),
    ):
        paths = [str(tmp_path / held)] if held else []
        corpus = Corpus(str(tmp_path / "train.txt"), paths, validation_fraction=0)
        tokenizer = Tokenizer(algorithm="bytes")
        data = PretrainingData(corpus, tokenizer, block_size=16, cache_dir=str(tmp_path / "cache"))
        data.trainer = SimpleNamespace(is_global_zero=False, limit_val_batches=1)  # type: ignore[assignment]
        message = (
            "the validation split has 0 documents with 0 tokens, but one block needs 17: lower --data.block_size, "
        )
        with pytest.raises(UserError, match=f"{message}give more text or {remedy}.* --data.corpus.validation_paths"):
            data.setup("fit")


@needs("generation")
def test_bytes_in_a_file_of_prompts_are_named(tmp_path: Path):
    from lm_lightning.generation.generate import read_prompts

    file = tmp_path / "prompts.txt"
    file.write_bytes(b"one\ntwo\ncaf\xe9 and\n")
    with pytest.raises(UserError, match="prompts.txt:3: byte 0xe9 is not UTF-8: convert the file"):
        read_prompts(str(file))
    with pytest.raises(UserError, match="cannot read the prompts of .*nowhere.txt: No such file"):
        read_prompts(str(tmp_path / "nowhere.txt"))


def test_the_only_checkpoint_is_damaged(tmp_path: Path):
    """Another one can be named only if there is another one."""
    file = tmp_path / "last.ckpt"
    file.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"last.ckpt \(7 bytes\) .* has no other one, so start a new run"):
        load_checkpoint(file)
    (tmp_path / "best.ckpt").write_bytes(b"damaged, too")
    with pytest.raises(UserError, match=r"last.ckpt \(7 bytes\) .* use another one in"):
        load_checkpoint(file)


def test_all_checkpoints_are_damaged(fit, cli, recipe: Path):
    run = fit("--trainer.max_steps", 5)
    files = list((run / "checkpoints").glob("*.ckpt"))
    for file in files:
        file.write_bytes(b"damaged")
    assert len(files) > 1
    with pytest.raises(
        UserError, match=f"none of the {len(files)} checkpoints in .*checkpoints can be used .*: start a new run"
    ):
        cli("fit", "--config", recipe, "--ckpt_path", "last")
