"""Every recipe under configs/ is run, with its own classes and options, but less data, few steps, a small network."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, paragraphs
from transformers import AutoConfig, AutoTokenizer

from lm_lightning.data.tokenizer import Tokenizer, train
from lm_lightning.security.untrusted import network_class

SMALL = {
    "gpt2": {"n_layer": 2, "n_embd": 48, "n_head": 2},
    "llama": {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3}
    | {"num_key_value_heads": 3},
    "awd_lstm": {"hidden_size": 48, "recurrent_size": 48, "num_hidden_layers": 2},
    "gated_cnn": {"hidden_size": 48, "num_hidden_layers": 2},
    "ngram": {"order": 3},
    "bert": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 64},
    "modernbert": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 64},
}


ELSEWHERE = ("InstructionData", "PreferenceData")  # recipes that the tests of their task run
RECIPES = {file: yaml.safe_load(file.read_text()) for file in sorted(ROOT.glob("configs/*.yaml"))}
RECIPES = {file: recipe for file, recipe in RECIPES.items() if recipe["data"]["class_path"] not in ELSEWHERE}
RECIPES = {file: recipe for file, recipe in RECIPES.items() if recipe["model"]["class_path"] != "NGramLM"}
PRETRAINING = ("PretrainingData", "MaskedData")
FROM_TEXT = [file for file, recipe in RECIPES.items() if recipe["data"]["class_path"] in PRETRAINING]
WRITING = ("Seq2SeqData",)  # which their own tests run
LABELLED = [file for file, recipe in RECIPES.items() if recipe["data"]["class_path"] not in (*PRETRAINING, *WRITING)]


def check(run: Path, steps: int) -> None:
    """Each step's loss is finite, and plain transformers loads all weights of the export, whose outputs are finite."""
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
        losses = {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}
    assert max(losses) == steps and all(math.isfinite(loss) and loss > 0 for loss in losses.values())
    config = AutoConfig.from_pretrained(run / "model")
    kind = network_class(config.architectures[0])
    network, info = kind.from_pretrained(run / "model", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert network.eval()(**tokenizer("The old captain", return_tensors="pt"))[0].isfinite().all()


@pytest.mark.parametrize("file", FROM_TEXT, ids=lambda file: file.stem)
@pytest.mark.slow
def test_recipe_trains_and_exports(file: Path, cli, tmp_path: Path, cache_dir: Path, corpus_file: Path):
    recipe = RECIPES[file]
    # a recipe's own tokenizer may be one of the Hub, which tests do without
    tokenizer = '{"path": null, "algorithm": "%s", "vocab_size": 400}' % (
        "wordpiece" if recipe["data"]["class_path"] == "MaskedData" else "bpe"
    )
    corpora = [f"corpora.{name}" for name in recipe["data"]["init_args"].get("corpora", [])] or ["corpus"]
    network = recipe["model"]["init_args"]["network"]
    flags = [f"--model.network.{key}={value}" for key, value in SMALL[network["model_type"]].items()]
    out = cli(
        *("fit", "--config", file, *flags, "--runs_dir", tmp_path, "--data.cache_dir", cache_dir),
        *(flag for corpus in corpora for flag in (f"--data.{corpus}.paths", corpus_file)),
        *(flag for corpus in corpora for flag in (f"--data.{corpus}.validation_fraction", 0.1)),
        *("--data.block_size", 64),
        *("--data.tokenizer", tokenizer, "--data.batch_size", 2, "--trainer.max_steps", 4),
        *("--model.schedule.warmup_steps", 1, "--trainer.val_check_interval", 2, "--trainer.limit_val_batches", 1),
        *("--trainer.accumulate_grad_batches", 2, "--model.compile", "false", "--trainer.accelerator", "cpu"),
        *("--trainer.log_every_n_steps", 1),
    )
    run = Path(out.split("run folder: ")[1].splitlines()[0])
    assert run.parent.name == file.stem
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4
    check(run, 4)


@pytest.mark.slow
@pytest.mark.parametrize("file", LABELLED, ids=lambda file: file.stem)
def test_recipe_of_labelled_data_trains_and_exports(file: Path, cli, tmp_path: Path):
    texts = paragraphs(40)
    tokenizer = train(Tokenizer(algorithm="wordpiece", vocab_size=300, lowercase=True), iter(texts), "bert")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = []  # with the columns of all tasks
    for text in texts:
        words = text.split()[:20]
        row = {"text": text, "pair": text[::-1], "label": str(len(text) % 2), "words": words, "form": words}
        row["labels"] = ["B-LONG" if len(word) > 6 else "O" for word in words]
        row["frames"] = [{"predicate": 1, "spans": [[0, 0, "ARG0"], [1, 1, "V"]]}]
        row |= {"head": list(range(len(words))), "deprel": ["root"] + ["next"] * (len(words) - 1)}
        row |= {"context": text, "question": "Which?", "answers": [{"text": words[0], "answer_start": 0}]}
        rows.append(row)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    network = json.dumps({"model_type": "bert", "max_position_embeddings": 512} | SMALL["bert"])
    out = cli(
        *("fit", "--config", file, "--model.network", network, "--data.tokenizer.path", tmp_path / "tokenizer"),
        *("--data.tables.train", tmp_path / "rows.jsonl", "--data.tables.validation_fraction", 0.3),
        *("--runs_dir", tmp_path, "--trainer.max_epochs", -1, "--trainer.max_steps", 3, "--data.batch_size", 4),
        *("--model.schedule.warmup_steps", 1, "--trainer.val_check_interval", 2, "--trainer.accelerator", "cpu"),
        *("--trainer.log_every_n_steps", 1),
    )
    run = Path(out.split("run folder: ")[1].splitlines()[0])
    assert (run / "checkpoints" / "best.ckpt").is_file()
    check(run, 3)
