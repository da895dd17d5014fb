"""The commands of docs/preference.md."""

import json
from pathlib import Path

import pytest
from conftest import needs
from reading import Reader, under
from test_preference import base, pairs  # noqa: F401 (a fixture)


@pytest.fixture
def user(reader: Reader, base: Path) -> Reader:  # noqa: F811
    """A reader with files of pairs and a GPT, on a small machine."""
    reader.base = base
    for name, rows in (("train", pairs()), ("dev", pairs()[:8]), ("new", pairs()[8:11])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    file = Path("configs/preference.yaml")
    file.write_text(file.read_text().replace("max_length: 1024", "max_length: 100"))
    return reader


@pytest.mark.slow
@under("docs/preference.md", "Preference tuning")
def test_fit_and_predict(user: Reader, typed: list[list[str]]):
    user.type_all(typed)
    assert [row["id"] for row in user.predictions()] == [0, 1, 2]
    user.validate()


@pytest.mark.slow
@under("docs/preference.md", "Objectives")
def test_another_objective(user: Reader, typed: list[list[str]]):
    user.type_all(typed)
    assert "beta: 2.5" in (user.fitted[-1] / "config.yaml").read_text()


@needs("lora")
@pytest.mark.slow
@under("docs/preference.md", "LoRA")
def test_lora(user: Reader, typed: list[list[str]]):
    user.type_all(typed)
    assert (user.fitted[-1] / "adapter" / "adapter_model.safetensors").is_file()
