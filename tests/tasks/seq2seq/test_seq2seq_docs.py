"""The commands of docs/seq2seq.md."""

import gzip
import json
from pathlib import Path

import pytest
import yaml
from reading import Reader, under
from tables import write
from test_seq2seq import BART, pairs


@pytest.fixture
def reader(reader: Reader) -> Reader:
    """A reader with short texts and less patience."""
    for file in (Path("configs/translation.yaml"), Path("configs/summarization.yaml")):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        model, trainer = content["model"]["init_args"], content["trainer"]
        if "network" in model:
            model["network"] = BART
            content["data"]["init_args"]["tokenizer"]["vocab_size"] = 300
        model["decoding"] |= {"num_beams": 2, "max_new_tokens": 10}
        model["schedule"] = {"warmup_steps": 1}
        trainer |= {"max_epochs": -1, "max_steps": 4, "accelerator": "cpu", "precision": "32-true"}
        trainer |= {"val_check_interval": 2, "check_val_every_n_epoch": None, "log_every_n_steps": 1}
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
    for seed, name in enumerate(("train", "dev")):
        rows = pairs(40, seed)
        write(f"{name}.jsonl", [{"source": [source], "target": target} for source, target in rows])
        for number, language in enumerate(("de", "en")):
            with gzip.open(f"{name}.{language}.gz", "wt", encoding="utf-8") as file:
                file.writelines(f"{row[number]}\n" for row in rows)
    Path("new.de").write_text("".join(f"{source}\n" for source, _ in pairs(5, 2)), encoding="utf-8")
    return reader


@pytest.mark.slow
@under("docs/seq2seq.md", "Translation and summarization")
def test_translation_and_summarization(reader: Reader, typed: list[list[str]]):
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    outs = reader.type_all(typed)
    assert "score: BLEU|" in outs[0] and "score: CHRF|" in outs[1] and len(reader.predictions()) == 5
    assert "cross-attention are new" in outs[3] and reader.logged("val/rougeL")
    samples = [json.loads(line) for line in (reader.fitted[0] / "samples.jsonl").read_text().splitlines()]
    assert all(row["reference"] for row in samples)
    reader.validate()
