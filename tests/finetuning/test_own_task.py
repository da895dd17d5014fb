"""A task outside the package, written as docs/extending.md describes it: data, a model, metrics, files of an export."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import evaluation

from lm_lightning.data.tokenizer import Tokenizer, train
from lm_lightning.errors import UserError
from lm_lightning.models import export
from lm_lightning.security.trust import PACKAGES

TASK = """import torch, torch.nn.functional as F, transformers
from lm_lightning.finetuning.data import LabelledData
from lm_lightning.finetuning.examples import network_inputs
from dataclasses import dataclass
from lm_lightning.models.export import ExtraFiles
from lm_lightning.models.metrics import Ratio
from lm_lightning.models.module import LanguageModule


@dataclass
class Card(ExtraFiles):
    author: str

    def files(self):
        return {"card.json": {"author": self.author}}


class ToyData(LabelledData):
    def key(self, row):
        return row.text("text")

    def labels_in(self, row):
        return [row.text("label")]

    def find_labels(self, found):
        self.labels = self.label_names(found)

    def encode(self, split, rows):
        examples = self.tokenize([row.text("text") for row in rows])
        for example, row in zip(examples, rows):
            example["targets"] = torch.tensor(-100 if split == "predict" else self.label_id(row, row.text("label")))
        return examples


class Toy(LanguageModule):
    auto_class = transformers.AutoModelForSequenceClassification

    def __init__(self, author="somebody", **options):
        super().__init__(**options)
        self.author = author

    @staticmethod
    def main_metric(data):
        return "accuracy"

    def network_made(self):
        self.correct = Ratio()

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        hits = self.network(**network_inputs(batch)).logits.argmax(-1) == batch["targets"]
        self.correct.update(hits.sum(), (batch["targets"] != -100).sum())

    def metric_modes(self):
        return {"loss": "min", "accuracy": "max"}

    def metrics(self, loss, split):
        accuracy = self.correct.compute()
        self.correct.reset()
        return {"loss": loss, "accuracy": accuracy}

    def join_predictions(self, rows):
        return [row | {"of": len(rows)} for row in rows]

    def extra_files(self):
        return Card(self.author)

    def on_save_checkpoint(self, checkpoint):
        super().on_save_checkpoint(checkpoint)
        checkpoint["author"] = self.author

    def head_settings(self):
        return self.label_settings()

    def loss(self, batch):
        logits = self.network(**network_inputs(batch)).logits
        return F.cross_entropy(logits, batch["targets"], reduction="sum"), (batch["targets"] != -100).sum()

    def predict_step(self, batch, batch_idx):
        numbers = self.network(**network_inputs(batch)).logits.argmax(-1).tolist()
        return [{"id": i, "label": self.trainer.datamodule.labels[n]} for i, n in zip(batch["id"], numbers)]
"""
TEXTS = {"long": "a text of many words, as this one has", "short": "a text"}


def test_a_task_of_ones_own_trains_and_predicts(
    cli: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "my_task.py").write_text(TASK)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "my_task", None)
    del sys.modules["my_task"]
    rows = [{"text": f"{text} {i}", "label": label} for i in range(40) for label, text in TEXTS.items()]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = Tokenizer(algorithm="wordpiece", vocab_size=100, lowercase=True)
    train(options, (row["text"] for row in rows), "bert").save_pretrained(tmp_path / "tokenizer")
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "hidden_dropout_prob": 0,
    }
    content = {
        "model": {
            "class_path": "my_task.Toy",
            "init_args": {
                "author": "me",
                "network": {"model_type": "bert", "max_position_embeddings": 64, **sizes},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 5e-3}},
            },
        },
        "data": {
            "class_path": "my_task.ToyData",
            "init_args": {
                "tables": {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation", "test")},
                "tokenizer": {"path": str(tmp_path / "tokenizer")},
                "batch_size": 16,
                "max_length": 32,
            },
        },
        "trainer": {"max_steps": 80, "accelerator": "cpu", "precision": "32-true"},
        "runs_dir": str(tmp_path / "runs"),
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(content))
    out = cli("fit", "--config", tmp_path / "toy.yaml")
    run = Path(next(line for line in out.splitlines() if line.startswith("run folder: ")).split(": ", 1)[1])
    assert json.loads((run / "model" / "card.json").read_text()) == {"author": "me"}
    monkeypatch.setattr(export, "LIVE", {})  # as in another process
    with pytest.raises(UserError, match=r"names the class of files my_task.Card, .* --trust_package my_task"):
        cli("export", run)
    monkeypatch.setenv(PACKAGES, "my_task")
    cli("export", run, "--output", tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "card.json").read_text()) == {"author": "me"}
    assert float(next(line for line in cli("test", run).splitlines() if "test/accuracy" in line).split("│")[2]) == 1
    cli("predict", run, "--data.batch_size", 7)  # the last batch has fewer rows, which are filled up
    predictions = [json.loads(line) for line in (evaluation(run) / "predictions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in predictions] == list(range(len(rows)))
    assert [row["label"] for row in predictions] == [row["label"] for row in rows]
    assert all(row["of"] == len(rows) for row in predictions)
    assert json.loads((run / "model" / "config.json").read_text())["id2label"] == {"0": "long", "1": "short"}
