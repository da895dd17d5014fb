"""The commands of docs/search.md."""

import pytest
from conftest import paragraphs
from reading import Reader, under
from tables import write


@under("docs/search.md", "Embeddings and semantic search")
@pytest.mark.slow
def test_semantic_search(reader: Reader, typed: list[list[str]]):
    rows = [{"title": text[:30], "abstract": text} for text in paragraphs(64)]
    write("train.csv", rows)
    texts = [{"title": row["abstract"]} for row in rows[:20]]
    write("texts.jsonl", texts)
    outs = reader.type_all(typed)
    found = [line.split("\t") for line in outs[-1].splitlines()]
    assert len(found) == 10 and {row[-1] for row in found} <= {row["title"] for row in texts}
