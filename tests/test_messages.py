"""Messages: every option that a message or the README names is one that is accepted."""

import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from lm_lightning.data.corpus import Corpus
from lm_lightning.data.labelled import Tables
from lm_lightning.models.lora import LoRA

ROOT = Path(__file__).parents[1]
FREE = ("model.optimizer.", "model.network.")  # of the class or network that is chosen
SOURCES = [*(ROOT / "lm_lightning").rglob("*.py"), ROOT / "README.md", *(ROOT / "configs").glob("*.yaml")]


@pytest.fixture(scope="module")
def accepted() -> set[str]:
    """The options of all classes of data and models, without the dashes."""
    names = set()
    for folder in ("data", "models"):
        for file in sorted((ROOT / "lm_lightning" / folder).glob("*.py")):
            module = importlib.import_module(f"lm_lightning.{folder}.{file.stem}")
            for _, kind in inspect.getmembers(module, inspect.isclass):
                bases = {base.__name__ for base in kind.__mro__}
                if kind.__module__ == module.__name__ and {"LightningDataModule", "LanguageModule"} & bases:
                    parser = ArgumentParser(exit_on_error=False)
                    parser.add_class_arguments(kind, folder.rstrip("s"), fail_untyped=False)
                    names |= set(parser.get_defaults().keys())
    names |= {f"model.lora.{option.name}" for option in dataclasses.fields(LoRA)}
    assert {"data.tables.encoding_errors", "data.corpus.paths", "data.columns.text", "model.pretrained"} <= names
    return names


def test_options_in_messages_are_accepted(accepted: set[str]):
    wrong = []
    for file in SOURCES:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            for name in re.findall(r"--((?:data|model)\.[a-z_]+(?:\.[a-z_]+)*)", line):
                known = any(name == option or option.startswith(f"{name}.") for option in accepted)
                if not (known or name.startswith(FREE) or name.endswith(".help")):
                    wrong.append(f"{file.relative_to(ROOT)}:{number}: --{name}")
    assert not wrong


def test_messages_of_shared_readers_name_options_of_corpora_and_tables():
    source = (ROOT / "lm_lightning" / "data" / "formats.py").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:\{reading\.options\}|\{self\.options\}|\{options\}| or )\.([a-z_]+)", source))
    corpus, tables = ({option.name for option in dataclasses.fields(kind)} for kind in (Corpus, Tables))
    assert {"encoding", "encoding_errors", "delimiter", "quoting"} <= named
    assert named - corpus == {"format"}, "read as tables only"
    assert named - tables == {"max_line"}, "read as a corpus only"
