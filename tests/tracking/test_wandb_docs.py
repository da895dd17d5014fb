"""The commands about Weights & Biases in docs/."""

import pytest
from reading import Reader, in_a_process, under


@under("docs/reports.md", "W&B")
@pytest.mark.slow
def test_weights_and_biases(reader: Reader, typed: list[list[str]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    reader.run = in_a_process
    reader.type_all(typed)
    assert list((reader.fitted[-1] / "wandb").glob("offline-run-*/*.wandb"))
