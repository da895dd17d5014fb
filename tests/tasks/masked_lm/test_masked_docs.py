"""The commands about BERT in docs/."""

import pytest
from reading import Reader, under


@under("docs/pretraining.md", "BERT")
@pytest.mark.slow
def test_bert(reader: Reader, typed: list[list[str]]):
    reader.type_all(typed)
    ((mask,),) = [row["masks"] for row in reader.predictions()]
    assert mask and all(0 < candidate["probability"] < 1 for candidate in mask)
    reader.validate()
