"""The commands of docs/lora.md."""

import pytest
from conftest import needs
from reading import Reader, under


@under("docs/lora.md", "LoRA")
@pytest.mark.slow
def test_gpt(reader: Reader, typed: list[list[str]]):
    reader.type_all(typed)
    assert (reader.fitted[-1] / "adapter" / "adapter_model.safetensors").is_file()
    reader.validate()


@needs("tasks.classification")
@under("docs/lora.md", "Fine-tuning with 4-bit weights")
@pytest.mark.slow
def test_fine_tuning(reader: Reader, typed: list[list[str]]):
    from tables import labelled, write

    write("train.csv", labelled("sentiment.yaml", 64, 0))
    write("new.csv", [{"text": row["text"]} for row in labelled("sentiment.yaml", 5, 1)])
    reader.type_all(typed)
    assert (reader.fitted[-1] / "adapter" / "adapter_model.safetensors").is_file()
    reader.validate()
    reader.run("predict", reader.fitted[-1], "--data.tables.predict", "new.csv")
    assert {row["label"] for row in reader.predictions()} <= {"1", "2"} and len(reader.predictions()) == 5
