"""Lists in cells are data."""

import pytest

from lm_lightning.finetuning import cells


def test_nothing_in_a_cell_is_run():
    for cell in ("[__import__('os').getcwd()]", "[1 for _ in 'a']", "[(lambda: 1)()]", "['a'] * 9"):
        with pytest.raises(ValueError, match="neither JSON nor"):
            cells.parsed(cell)


def test_lists_of_named_labels_of_the_hub(monkeypatch):
    import datasets

    from lm_lightning.data.hub_rows import hub_rows

    tags = datasets.Sequence(datasets.ClassLabel(names=["O", "B-X"]))
    features = datasets.Features({"words": datasets.Sequence(datasets.Value("string")), "tags": tags})
    content = datasets.Dataset.from_list([{"words": ["a", "b"], "tags": [1, 0]}], features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: content)
    rows = list(hub_rows("any/name", None, "train", None, False, ""))
    assert rows == [(1, {"words": ["a", "b"], "tags": ["B-X", "O"]})]
