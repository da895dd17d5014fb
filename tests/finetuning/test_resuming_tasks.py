"""Every task resumes exactly, with dropout, from the middle of an epoch and from its end."""

import json
from pathlib import Path

import pytest
from conftest import paragraphs
from test_configs import ROOT, SMALL
from test_fit import metrics, same, weights
from test_resuming import snapshots

from lm_lightning.checkpoints.loading import load_checkpoint
from lm_lightning.data.tokenizer import Tokenizer, train

TASKS = {  # recipe: more flags
    "sentiment": (),
    "similarity": ("--data.kind", "regression", "--data.columns.pair", "null", "--data.columns.label", "number"),
    "tagging": (),
    "roles": (),
    "parsing": (),
    "questions": ("--data.max_length", 200),
    "search": (
        *("--model.mini_batch_size", 2, "--model.mining.every_n_epochs", 1, "--model.mining.first_epoch", 0),
        *("--model.mining.negatives", 2, "--model.mining.margin", 0),
    ),
    "embedding": ("--data.columns.score", "number"),
}


def rows() -> list[dict]:
    """Rows with the columns of all tasks."""
    found = []
    for text in paragraphs(30):
        words = text.split()[:12]
        row = {"text": " ".join(words), "pair": " ".join(reversed(words)), "label": str(len(text) % 2)}
        row |= {"number": len(text) % 7 / 7, "words": words, "form": words, "head": list(range(len(words)))}
        row |= {"labels": ["B-LONG" if len(word) > 6 else "O" for word in words]}
        row |= {"frames": [{"predicate": 1, "spans": [[0, 0, "ARG0"], [1, 1, "V"]]}]}
        row |= {"deprel": ["root"] + ["next"] * (len(words) - 1)}
        row |= {"context": " ".join(words), "question": "Which?", "answers": [{"text": words[0], "answer_start": 0}]}
        found.append(row)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("task", [task for task in TASKS if (ROOT / "configs" / f"{task}.yaml").exists()])
def test_a_task_resumes_exactly_with_dropout(task: str, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    texts = [row["text"] for row in rows()]
    train(Tokenizer(algorithm="wordpiece", vocab_size=200, lowercase=True), iter(texts), "bert").save_pretrained(
        tmp_path / "tokenizer"
    )
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    network = {"model_type": "bert", "max_position_embeddings": 256, "hidden_dropout_prob": 0.2} | sizes
    assert network.keys() >= SMALL["bert"].keys()
    flags = (
        *("fit", "--config", ROOT / "configs" / f"{task}.yaml", "--model.network", json.dumps(network)),
        *("--data.tokenizer.path", tmp_path / "tokenizer", "--data.tables.train", tmp_path / "rows.jsonl"),
        *("--data.tables.validation_fraction", 0.3, "--runs_dir", tmp_path / "runs", "--data.batch_size", 4),
        *("--trainer.max_epochs", -1, "--trainer.max_steps", 4, "--trainer.accelerator", "cpu"),
        *("--trainer.log_every_n_steps", 1, "--trainer.val_check_interval", 1.0, "--trainer.limit_train_batches", 3),
        *("--last.every_n_train_steps", 1, "--trainer.precision", "32-true", *TASKS[task]),
    )
    with monkeypatch.context() as patch:
        kept = snapshots(patch, tmp_path / "kept")
        whole = Path(cli(*flags).split("run folder: ")[1].splitlines()[0])
    steps = {load_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"]: run for run in kept}
    for step in (2, 3):  # the latter is the end of an epoch, whose validation is finished
        copy = steps[step]  # (another --runs_dir than that of the copy would start a new run)
        cli(*flags, "--runs_dir", copy.parent.parent, "--ckpt_path", copy / "checkpoints" / "last.ckpt")
        assert same(weights(steps[step]), weights(whole)) and metrics(steps[step]) == metrics(whole), step
