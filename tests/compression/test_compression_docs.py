"""The commands of docs/compression.md."""

import csv
from pathlib import Path

import pytest
from reading import Reader, under


def table(reader: Reader) -> list[dict[str, str]]:
    """What was measured of the last run's models."""
    with open(reader.fitted[-1] / "compressed" / "compression.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@under("docs/compression.md", "Compression")
def test_compress(reader: Reader, typed: list[list[str]]):
    recipe = Path("configs/gpt.yaml")
    recipe.write_text(recipe.read_text().replace("n_embd: 48", "n_embd: 64"))  # bitsandbytes packs 32 outputs on CPUs
    reader.type_all(typed)
    assert len(table(reader)) == 4


@pytest.mark.slow
@under("docs/compression.md", "Training a compressed model")
def test_training(reader: Reader, typed: list[list[str]]):
    reader.type_all(typed)
    assert len(table(reader)) > 1
