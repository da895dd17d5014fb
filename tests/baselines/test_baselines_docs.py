"""The commands of docs/baselines.md."""

import pytest
from conftest import needs
from reading import Reader, under


@needs("generation")
@under("docs/baselines.md", "Baselines")
@pytest.mark.slow
def test_networks(reader: Reader, typed: list[list[str]]):
    reader.type_all(typed)
