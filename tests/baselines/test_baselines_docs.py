"""The commands of docs/baselines.md."""

import pytest
from conftest import needs
from reading import Reader, under


@under("docs/baselines.md", "Baselines")
@pytest.mark.slow
def test_training(reader: Reader, typed: list[list[str]]):
    reader.type_all(typed)
    assert [run.parent.name for run in reader.fitted] == ["lstm", "cnn", "ngram"]


@needs("generation")
@under("docs/baselines.md", "Generation")
@pytest.mark.slow
def test_generation(reader: Reader, typed: list[list[str]]):
    assert reader.type_all(typed)[1].startswith("This function returns")
