"""`prepare` for the data of a BERT."""

from pathlib import Path

import yaml


def test_prepare_shows_the_samples_of_a_bert_as_they_are_before_masking(cli, recipe: Path):
    content = yaml.safe_load(recipe.read_text())
    content["data"]["class_path"] = "MaskedData"
    content["data"]["init_args"]["tokenizer"] = {"vocab_size": 300, "algorithm": "wordpiece", "lowercase": True}
    content["data"]["init_args"]["masking"] = {"rate": 0.2}
    recipe.write_text(yaml.safe_dump(content))
    out = cli("prepare", "--config", recipe)
    train = next(line for line in out.splitlines() if line.startswith("train")).split()
    blocks = int(train[5].replace(",", ""))
    shown = cli("prepare", "--config", recipe, "--show", 0, blocks - 1)
    assert "--- sample 0\n[CLS] 0 " in shown and f"--- sample {blocks - 1}\n" in shown and "[MASK]" not in shown
    pairs = cli("prepare", "--config", recipe, "--data.next_sentence", "true", "--show", 0)
    assert "--- sample 0\n" in pairs and "second one may be from any document" in pairs
