"""Classification: labels keep their names, scores are right, and plain transformers tells the same."""

import ast
import csv
import json
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, command, evaluation, needs
from forks import python
from PIL import Image
from safetensors.torch import load_file, save_file

from lm_lightning.data.order import samples_at
from lm_lightning.data.reading import ReadReport
from lm_lightning.data.tokenizer import Tokenizer, train
from lm_lightning.errors import UserError
from lm_lightning.finetuning.examples import Examples, by_length
from lm_lightning.finetuning.tables import Tables
from lm_lightning.optim import parameter_groups
from lm_lightning.tasks.classification.data import ClassificationData

WORDS = {"good": ["fine", "lovely", "bright"], "bad": ["dull", "awful", "bleak"], "mixed": ["odd", "long", "plain"]}

# Larger first weights than by default, with which so small a network learns slowly
QUICK = ("--model.network.initializer_range", 0.1)


def rows(number: int, seed: int) -> list[dict]:
    """Sentences of made-up words, whose label and number are those of the one telling word."""
    draw, result = random.Random(seed), []
    for i in range(number):
        label = draw.choice(list(WORDS))
        text = " ".join(
            draw.choices(["the", "film", "was", "a", "story", "of", "two", "rivers"], k=draw.randint(2, 12))
        )
        other = draw.choice(["it", "they", "we"])
        row = {
            "text": f"{text} {draw.choice(WORDS[label])}",
            "other": other,
            "label": label,
            "number": 2.5 * list(WORDS).index(label),
        }
        result.append(row | {"several": [label] + (["short"] if len(text) < 20 else []), "i": i})
    return result


def write(path: Path, content: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = (row["text"] for row in rows(300, 0))
    train(Tokenizer(algorithm="wordpiece", vocab_size=200, lowercase=True), texts, "bert").save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path: Path, tokenizer: Path) -> Path:
    """A tiny BERT that tells three labels after some twenty steps."""
    files = {
        split: [str(write(tmp_path / f"{split}.jsonl", rows(n, i)))]
        for i, (split, n) in enumerate({"train": 300, "validation": 50, "test": 45}.items())
    }
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    network = {"model_type": "bert", "max_position_embeddings": 64, **sizes}
    content = {
        "model": {
            "class_path": "Classification",
            "init_args": {
                "network": network,
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-3}},
                "schedule": {"warmup_steps": 2, "shape": "constant"},
            },
        },
        "data": {
            "class_path": "ClassificationData",
            "init_args": {"tables": files, "tokenizer": {"path": str(tokenizer)}, "max_length": 32, "batch_size": 16},
        },
        "best": {"monitor": "val/accuracy"},
        "trainer": {
            **{"max_steps": 40, "val_check_interval": 20, "check_val_every_n_epoch": None, "log_every_n_steps": 1},
            **{"accelerator": "cpu", "precision": "32-true"},
        },
        "runs_dir": str(tmp_path / "runs"),
    }
    file = tmp_path / "classify.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def test_labels_are_learned_and_told_by_transformers_pipeline(fit, cli, recipe: Path, tmp_path: Path):
    from transformers import pipeline

    run = fit("--trainer.max_steps", 80, "--model.network.hidden_dropout_prob", 0)
    out = cli("test", "--config", recipe, "--ckpt_path", run / "checkpoints" / "best.ckpt")
    gold = rows(45, 2)
    tell = pipeline("text-classification", str(run / "model"))
    told = tell([row["text"] for row in gold], top_k=None)
    cli("predict", "--config", recipe, "--ckpt_path", run / "checkpoints" / "best.ckpt")
    predicted = [json.loads(line) for line in (evaluation(run) / "predictions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in predicted] == list(range(45))
    for own, other in zip(predicted, told):
        scores = {entry["label"]: entry["score"] for entry in other}
        assert scores.keys() == WORDS.keys() == own["scores"].keys()
        assert all(abs(scores[label] - own["scores"][label]) < 1e-5 for label in scores)
    right = sum(own["label"] == row["label"] for own, row in zip(predicted, gold))
    assert right / 45 > 0.8 and "test/accuracy" in out

    with open(evaluation(run, "test") / "results.csv", newline="") as file:  # of the best state, which may be another
        table = list(csv.DictReader(file))
    assert [row["label"] for row in table] == sorted(WORDS)
    assert sum(int(row["rows"]) for row in table) == 45


def test_the_docs_load_the_exported_folder(fit, capsys):
    run = fit("--trainer.max_steps", 6)
    code = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    assert '"runs/sentiment/RUN/model"' in code
    exec(code.replace('"runs/sentiment/RUN/model"', repr(str(run / "model"))), {})  # noqa: S102
    own, pipelines = capsys.readouterr().out.splitlines()[-2:]
    told = {entry["label"]: entry["score"] for entry in ast.literal_eval(pipelines)}
    assert ast.literal_eval(own) == pytest.approx(told, abs=1e-5) and told.keys() == WORDS.keys()


@pytest.mark.slow
def test_metrics_are_those_of_the_definitions(fit, cli, recipe: Path):
    run = fit("--trainer.max_steps", 12)  # not yet perfect
    out = cli("test", "--config", recipe, "--ckpt_path", run / "checkpoints" / "best.ckpt", "--data.batch_size", 16)
    cli("predict", "--config", recipe, "--ckpt_path", run / "checkpoints" / "best.ckpt")
    told = [json.loads(line)["label"] for line in (evaluation(run) / "predictions.jsonl").read_text().splitlines()]
    gold = [row["label"] for row in rows(45, 2)]
    with open(evaluation(run, "test") / "results.csv", newline="") as file:
        table = {row["label"]: row for row in csv.DictReader(file)}
    f1 = []
    for label in WORDS:
        both = sum(t == g == label for t, g in zip(told, gold))
        f1.append(2 * both / (told.count(label) + gold.count(label)))
        values = {"precision": both / max(told.count(label), 1), "recall": both / gold.count(label), "f1": f1[-1]}
        assert {name: float(table[label][name]) for name in values} == pytest.approx(values)
        assert int(table[label]["rows"]) == gold.count(label)
    with open(evaluation(run, "test") / "confusion.csv", newline="") as file:
        head, *counts = csv.reader(file)
    assert counts == [[g, *(str(list(zip(gold, told)).count((g, t))) for t in head[1:])] for g in sorted(WORDS)]
    assert (evaluation(run, "test") / "results.md").read_text().startswith("test, best.ckpt\n")
    assert Image.open(evaluation(run, "test") / "confusion.png").size[0] > 300
    accuracy = sum(t == g for t, g in zip(told, gold)) / 45
    for name, value in {"accuracy": accuracy, "macro_f1": sum(f1) / 3}.items():
        shown = next(line for line in out.splitlines() if f"test/{name}" in line).split("│")[2]
        assert float(shown) == pytest.approx(value, abs=1e-5)


@pytest.mark.slow
def test_predictions_are_aligned_with_a_csv_file(fit, cli, recipe: Path):
    """Two processes, rows of all lengths in batches of similar ones: the table has the file's order."""
    run, content = fit("--trainer.max_steps", 60, *QUICK), rows(21, 4)
    file = recipe.parent / "new.csv"
    content = [row | {"label": "unknown", "note, \n": f'a "{i}"\t,' if i % 3 else ""} for i, row in enumerate(content)]
    columns = ["note, \n", "label", "text", "other"]
    with open(file, "w", newline="") as stream:
        table = csv.DictWriter(stream, columns, extrasaction="ignore")
        table.writeheader()
        table.writerows(content)
    flags = ("--config", recipe, "--ckpt_path", run / "checkpoints" / "best.ckpt", "--data.tables.predict", file)
    result = command("predict", *flags, "--data.batch_size", 4, "--trainer.devices", 2, "--trainer.strategy", "ddp")
    assert result.returncode == 0, result.stderr
    with open(evaluation(run) / "predictions.csv", newline="") as stream:
        told = list(csv.DictReader(stream))
    assert list(told[0])[:6] == [*columns, "predicted.id", "predicted.label"]
    given = [{column: row[column] for column in columns} for row in content]
    assert [{column: row[column] for column in columns} for row in told] == given
    assert [int(row["predicted.id"]) for row in told] == list(range(21))
    assert sum(row["predicted.label"] == right["label"] for row, right in zip(told, rows(21, 4))) > 0.8 * 21
    for row in told:
        scores = {label: float(row[f"predicted.scores.{label}"]) for label in WORDS}
        assert max(scores, key=scores.__getitem__) == row["predicted.label"]
        assert sum(scores.values()) == pytest.approx(1)


def test_no_cell_is_a_formula_of_a_spreadsheet_program_if_asked_for(fit, cli, recipe: Path):
    for split in ("train", "validation", "test"):
        file = recipe.parent / f"{split}.jsonl"
        file.write_text(file.read_text().replace('"label": "good"', '"label": "=1+2"'))
    file = recipe.parent / "new.csv"
    cells = ["=HYPERLINK(1)", "+a", "-1.5", "-a", "@a", "\ta", "\ra", "\uff1da", "a=b", "1e-3", "", " =a"]
    with open(file, "w", newline="") as stream:
        csv.writer(stream).writerows([["text", "=note"], *(["a film", cell] for cell in cells)])
    run = fit("--trainer.max_steps", 3, "--trainer.val_check_interval", 3, "--predictions.escape_formulas", "true")

    def table(name: str, *flags: str) -> list[list[str]]:
        if flags:
            cli("predict", run, "--data.tables.predict", file, *flags)
        with open((evaluation(run) if flags else run) / name, newline="", encoding="utf-8") as stream:
            return list(csv.reader(stream))

    assert {row[0] for row in table("results.csv")[1:]} == {"'=1+2", "bad", "mixed"}
    assert table("confusion.csv")[0][1:] == ["'=1+2", "bad", "mixed"]
    plain = table("predictions.csv", "--predictions.escape_formulas", "false")
    assert plain[0][1] == "=note" and [row[1] for row in plain[1:]] == cells
    escaped = table("predictions.csv", "--data.batch_size", "8")  # as the run has been asked
    dangerous = [cell for cell in cells if cell not in ("-1.5", "a=b", "1e-3", "", " =a")]
    assert escaped[0][1] == "'=note"
    assert [row[1] for row in escaped[1:]] == [f"'{cell}" if cell in dangerous else cell for cell in cells]
    assert {row[3] for row in escaped[1:]} <= {"'=1+2", "bad", "mixed"}


def test_evaluation_needs_little_padding():
    lengths = np.random.default_rng(0).integers(5, 100, size=500)
    examples = Examples(
        [{"input_ids": [1] * int(length), "targets": torch.tensor(row)} for row, length in enumerate(lengths)], None
    )
    batches = [[len(examples[i]["input_ids"]) for i in range(start, start + 20)] for start in range(0, 500, 20)]
    assert sum(map(sum, batches)) / sum(max(batch) * 20 for batch in batches) > 0.9
    assert sorted(examples[i]["id"] for i in range(500)) == list(range(500))
    assert all(examples[i]["targets"] == examples[i]["id"] for i in range(500))


def pipeline_in_a_fresh_process(model: Path, pairs: list[tuple]) -> list[list[dict]]:
    """What plain `transformers`, without this project, tells of texts and pairs: the score of each label."""
    script = """
import json, sys
from transformers import pipeline
tell = pipeline("text-classification", sys.argv[1], device="cpu")
inputs = [{"text": text, "text_pair": pair} if pair else text for text, pair in json.load(sys.stdin)]
print(json.dumps([tell([one], top_k=None)[0] for one in inputs]))
assert "lm_lightning" not in sys.modules
"""
    result = subprocess.run(
        [python("transformers"), "-c", script, str(model)],
        input=json.dumps(pairs),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "metric"),
    [
        (("--data.kind", "regression", "--data.columns.label", "number"), "spearman"),
        (("--data.kind", "multilabel", "--data.columns.label", "several"), "exact_match"),
        (
            ("--data.columns.pair", "other", "--model.class_weights", "balanced", "--model.label_smoothing", 0.1),
            "accuracy",
        ),
    ],
    ids=["number", "several", "pair"],
)
def test_kinds(fit, cli, recipe: Path, flags: tuple, metric: str):
    off = ("--model.network.hidden_dropout_prob", 0, "--model.network.attention_probs_dropout_prob", 0)
    quickly = ("--trainer.max_steps", 80, "--trainer.val_check_interval", 80, "--model.optimizer.lr", 1e-2, *QUICK)
    slowly = ("--trainer.max_steps", 240, "--trainer.val_check_interval", 240)
    learning = slowly if metric == "exact_match" else quickly
    run = fit(*flags, *off, "--best.monitor", "val/loss", *learning)
    with open(run / "metrics.csv", newline="") as file:
        values = [float(row[f"val/{metric}"]) for row in csv.DictReader(file) if row[f"val/{metric}"]]
    assert values[-1] > 0.5
    cli("predict", "--config", recipe, *flags, "--ckpt_path", run / "checkpoints" / "best.ckpt")
    predicted = [json.loads(line) for line in (evaluation(run) / "predictions.jsonl").read_text().splitlines()]
    pair = "other" if metric == "accuracy" else None
    told = pipeline_in_a_fresh_process(run / "model", [(row["text"], row.get(pair)) for row in rows(45, 2)])
    for own, other in zip(predicted, told):
        expected = {entry["label"]: entry["score"] for entry in other}
        scores = own.get("scores") or {"LABEL_0": own["score"]}
        assert scores == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_results_of_several_labels_are_those_of_the_definitions(fit, cli, recipe: Path):
    flags = ("--data.kind", "multilabel", "--data.columns.label", "several", "--best.monitor", "val/loss")
    flags = (*flags, "--model.schedule.warmup_steps", 2)
    run = fit(*flags, "--trainer.max_steps", 120, "--trainer.val_check_interval", 120)
    for command_ in ("test", "predict"):
        cli(command_, "--config", recipe, *flags, "--ckpt_path", run / "checkpoints" / "best.ckpt")
    told = [
        set(json.loads(line)["labels"]) for line in (evaluation(run) / "predictions.jsonl").read_text().splitlines()
    ]
    gold = [set(row["several"]) for row in rows(45, 2)]
    with open(evaluation(run, "test") / "results.csv", newline="") as file:
        table = {row["label"]: row for row in csv.DictReader(file)}
    assert table.keys() == {*WORDS, "short"}
    for label, row in table.items():
        both = sum(label in t and label in g for t, g in zip(told, gold))
        has, said = sum(label in g for g in gold), sum(label in t for t in told)
        values = (int(row["rows"]), float(row["recall"]), float(row["precision"]))
        assert values == pytest.approx((has, both / max(has, 1), both / max(said, 1))), label
    assert any(float(row["precision"]) > 0.5 for row in table.values())


@pytest.mark.slow
def test_training_stops_early(fit):
    stop = ("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val/accuracy")
    stop = (*stop, "--trainer.callbacks.mode", "max", "--trainer.callbacks.patience", 2)
    run = fit(*stop, "--trainer.callbacks.min_delta", 1.0, "--trainer.val_check_interval", 5)  # nothing improves by 1
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 15


@pytest.mark.slow
def test_a_new_head_for_numbers_starts_at_their_mean(fit, recipe: Path):
    numbers = ("--data.kind", "regression", "--data.columns.label", "number", "--best.monitor", "val/loss")
    flags = ("--trainer.max_steps", 3, "--model.optimizer.lr", 1e-6)
    base = fit("--trainer.max_steps", 3)  # of labels, whose head is not taken
    run = fit(*numbers, *flags, "--model.network", "null", "--model.pretrained", base)
    bias = load_file(run / "model" / "model.safetensors")["classifier.bias"]
    assert bias.item() == pytest.approx(np.mean([row["number"] for row in rows(300, 0)]), abs=1e-4)
    other = write(recipe.parent / "other.jsonl", [row | {"number": row["number"] + 5} for row in rows(300, 0)])
    again = fit(*numbers, *flags, "--model.network", "null", "--model.pretrained", run, "--data.tables.train", other)
    assert load_file(again / "model" / "model.safetensors")["classifier.bias"] == pytest.approx(bias, abs=1e-4)


@pytest.mark.slow
def test_resumed_run_and_other_micro_batches_are_the_same(fit, recipe: Path):
    off = ("--model.network.hidden_dropout_prob", 0, "--model.network.attention_probs_dropout_prob", 0)
    whole = fit("--name", "whole", *off, "--trainer.max_steps", 30, "--trainer.val_check_interval", 10)
    parts = ("--data.batch_size", 8, "--trainer.accumulate_grad_batches", 2, "--trainer.val_check_interval", 10)
    part = fit("--name", "part", *off, "--trainer.max_steps", 15, *parts)
    assert fit("--name", "part", *off, "--trainer.max_steps", 30, *parts, "--ckpt_path", "last") == part
    states = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (whole, part)]
    assert all(torch.allclose(states[0][key], states[1][key], atol=1e-4) for key in states[0])


@needs("sharding")
@pytest.mark.slow
def test_two_processes_do_and_score_what_one_does(fit, recipe: Path):
    """50 rows of validation and 8 a batch: the last batches are unequal, and padding does not count."""
    off = ("--model.network.hidden_dropout_prob", 0, "--model.network.attention_probs_dropout_prob", 0)
    off = (*off, "--trainer.max_steps", 10, "--trainer.val_check_interval", 5)
    one = fit("--name", "one", *off)
    flags = ("--trainer.strategy", "fsdp2", "--trainer.devices", 2, "--data.batch_size", 8, "--name", "two")
    result = command("fit", "--config", recipe, *off, *flags)
    assert result.returncode == 0, result.stderr
    (two,) = (recipe.parent / "runs" / "two").iterdir()
    values = []
    for run in (one, two):
        with open(run / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        names = ("train/loss", "val/loss", "val/accuracy", "val/macro_f1", "val/matthews")
        values.append([float(row[name]) for row in rows for name in names if row[name]])
    assert len(values[0]) == 10 + 2 * 4 and values[0] == pytest.approx(values[1], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("held", [50, 6])  # 50: the last batch of the second process is all padding; 6: its only one
def test_two_processes_score_numbers_as_one_does(fit, recipe: Path, held: int):
    write(recipe.parent / "validation.jsonl", rows(held, 1))
    off = ("--model.network.hidden_dropout_prob", 0, "--model.network.attention_probs_dropout_prob", 0)
    flags = ("--data.kind", "regression", "--data.columns.label", "number", "--best.monitor", "val/loss", *off)
    flags = (*flags, "--trainer.max_steps", 20)
    one = fit("--name", "one", *flags)
    ddp = ("--trainer.strategy", "ddp", "--trainer.devices", 2, "--data.batch_size", 8, "--name", "two")
    result = command("fit", "--config", recipe, *flags, *ddp)
    assert result.returncode == 0, result.stderr
    (two,) = (recipe.parent / "runs" / "two").iterdir()
    values = []
    for run in (one, two):
        with open(run / "metrics.csv", newline="") as file:
            (row,) = [row for row in csv.DictReader(file) if row["val/loss"]]
        values.append([float(row[f"val/{name}"]) for name in ("loss", "pearson", "spearman", "mae")])
    assert values[0] == pytest.approx(values[1], abs=1e-3)  # (trained with other rounding)


@pytest.mark.slow
def test_weights_of_labels_are_relative(fit, cli, recipe: Path):
    """Weights of which a batch has less than 1 in all give the same steps; measuring needs no weights."""
    losses = []
    for weight in (1, 0.01):
        weights = ("--model.class_weights", json.dumps({"good": weight, "bad": weight, "mixed": 3 * weight}))
        run = fit("--name", f"weight-{weight}", *weights, "--trainer.max_steps", 5, "--trainer.limit_val_batches", 0)
        with open(run / "metrics.csv", newline="") as file:
            losses.append([float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]])
    assert len(losses[0]) == 5 and losses[0] == pytest.approx(losses[1], abs=1e-4)
    measure = ("--config", recipe, "--model.class_weights", "balanced", "--ckpt_path")
    for name in ("test", "predict"):
        cli(name, *measure, run / "checkpoints" / "last.ckpt")


@pytest.mark.slow
def test_gpts_whose_tokenizer_has_no_padding(fit, recipe: Path, tmp_path: Path):
    """As OpenAI's: the network reads the last token before the padding, the export tells which that is."""
    from transformers import AutoTokenizer, pipeline

    texts = (row["text"] for row in rows(300, 0))
    tokenizer = train(Tokenizer(algorithm="bpe", vocab_size=300), texts, "gpt")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "gpt")
    assert AutoTokenizer.from_pretrained(tmp_path / "gpt").pad_token is None
    network = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 64}
    flags = ("--data.tokenizer.path", tmp_path / "gpt", "--data.max_length", 60)
    run = fit("--model.network", json.dumps(network), *flags, "--trainer.max_steps", 100)
    weights = shutil.copytree(run / "model", tmp_path / "weights")
    shutil.copytree(tmp_path / "gpt", weights, dirs_exist_ok=True)
    fit("--model.network", "null", "--model.pretrained", weights, *flags, "--trainer.max_steps", 5)
    gold = rows(45, 2)
    told = pipeline("text-classification", str(run / "model"))([row["text"] for row in gold], batch_size=8)
    assert sum(t["label"] == row["label"] for t, row in zip(told, gold)) > 0.8 * 45


def accuracy(out: str) -> float:
    return float(next(line for line in out.splitlines() if "test/accuracy" in line).split("│")[2])


@pytest.mark.slow
def test_a_trained_network_tells_its_labels_itself(fit, cli, recipe: Path):
    """A network's labels may be numbered in any order; rows are counted by their names."""
    run = fit("--trainer.max_steps", 60, *QUICK)
    other = recipe.parent / "other"
    shutil.copytree(run / "model", other)
    config = json.loads((other / "config.json").read_text())
    names = ["mixed", "good", "bad"]  # here they are sorted: bad, good, mixed
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    (other / "config.json").write_text(json.dumps(config))
    weights = load_file(other / "model.safetensors")
    turned = {k: v.flip(0).contiguous() if k.startswith("classifier.") else v for k, v in weights.items()}
    save_file(turned, other / "model.safetensors", metadata={"format": "pt"})

    right = accuracy(cli("test", "--config", recipe, "--ckpt_path", run / "checkpoints" / "best.ckpt"))
    assert right > 0.8
    for pretrained in (run, other):
        measure = ("test", "--config", recipe, "--model.network", "null", "--model.pretrained", pretrained)
        assert accuracy(cli(*measure)) == pytest.approx(right)
        assert accuracy(cli(*measure, "--data.tables.train", "[]")) == pytest.approx(right)


@pytest.mark.slow
def test_a_bert_pretrained_here_is_tuned(cli, recipe: Path, corpus_file: Path, cache_dir: Path):
    """From its run folder, with its tokenizer, and with the weights that it has learned."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    bert = cli(
        *(
            "fit",
            "--config",
            ROOT / "configs" / "bert.yaml",
            "--data.corpus.paths",
            corpus_file,
            "--data.cache_dir",
            cache_dir,
        ),
        *("--data.tokenizer.vocab_size", 400, "--data.block_size", 64, "--data.batch_size", 2),
        *(f"--model.network.{key}={value}" for key, value in small.items()),
        *("--trainer.max_steps", 3, "--model.schedule.warmup_steps", 1, "--trainer.limit_val_batches", 0),
        *("--runs_dir", recipe.parent / "runs", "--trainer.accelerator", "cpu", "--model.compile", "false"),
    )
    pretrained = bert.split("run folder: ")[1].splitlines()[0]
    flags = ("--model.network", "null", "--model.pretrained", pretrained, "--data.tokenizer", '{"path": null}')
    out = cli("fit", "--config", recipe, *flags, "--model.freeze", '["bert.*"]', "--trainer.max_steps", 3)
    run = Path(out.split("run folder: ")[1].splitlines()[0])
    weights, tuned = (load_file(Path(folder) / "model" / "model.safetensors") for folder in (pretrained, run))
    same = [name for name in weights if name.startswith("bert.") and torch.equal(weights[name], tuned[name])]
    assert len(same) == sum(name.startswith("bert.") for name in weights) > 30
    vocabularies = [json.loads((Path(f) / "model" / "tokenizer.json").read_text())["model"] for f in (pretrained, run)]
    assert vocabularies[0] == vocabularies[1]


@pytest.mark.slow
def test_a_network_of_other_labels_gets_a_new_head(fit, cli, recipe: Path):
    run = fit("--trainer.max_steps", 5)
    train = write(recipe.parent / "two.jsonl", [row for row in rows(100, 3) if row["label"] != "mixed"])
    flags = ("--model.network", "null", "--model.pretrained", run, "--data.tables.train", train)
    two = fit(*flags, "--data.tables.validation", train, "--trainer.max_steps", 5)
    assert json.loads((two / "model" / "config.json").read_text())["id2label"] == {"0": "bad", "1": "good"}
    evaluated = cli("test", "--config", recipe, *flags)  # by the labels of the network, whatever the training rows have
    assert accuracy(evaluated) == accuracy(cli("test", run))
    flags = ("--model.network", "null", "--model.pretrained", two, "--data.tables.train", train)
    with pytest.raises(UserError, match=r"the label 'mixed' is not one of the evaluated network \(bad, good\)"):
        cli("test", "--config", recipe, *flags)


def test_a_data_set_of_the_hub_has_the_names_of_its_labels(fit, cli, recipe: Path, monkeypatch):
    import datasets

    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["mixed", "good", "bad"])}

    def load_dataset(name, config, split, revision, streaming):
        assert (name, config, revision, streaming) == ("any/name", "small", "v1", False)
        content = [{key: row[key] for key in features} for row in rows(60, len(split))]
        if split == "unlabelled":
            content[2]["label"] = -1
        return datasets.Dataset.from_list(content, features=datasets.Features(features))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = ("--data.tables.hub", "any/name", "--data.tables.hub_config", "small", "--data.tables.hub_revision", "v1")
    flags = (*hub, "--data.tables.train", "train", "--data.tables.validation", "validation", "--trainer.max_steps", 3)
    run = fit(*flags)
    assert json.loads((run / "model" / "config.json").read_text())["id2label"] == dict(zip("012", sorted(WORDS)))
    with pytest.raises(UserError, match=r"any/name \(unlabelled\):3: the row has no label"):
        fit(*flags, "--data.tables.validation", "unlabelled")


def test_a_text_is_not_in_training_and_validation(tmp_path: Path):
    content = [row | {"i": i} for i, row in enumerate(rows(100, 5) * 3)]  # thrice, with other numbers
    data = ClassificationData(
        tables=Tables(train=str(write(tmp_path / "rows.jsonl", content)), validation_fraction=0.3)
    )
    train, held = ({row["text"] for row in data.read(split, ReadReport())} for split in ("train", "validation"))
    assert not train & held and train | held == {row["text"] for row in content}
    assert 0.15 < len(held) / len(train | held) < 0.45
    data.tables.validation_fraction = 1
    with pytest.raises(UserError, match="validation_fraction is 1, but must be from 0 to below 1"):
        list(data.read("train", ReadReport()))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"label": "strange"},
            r"validation.jsonl:4: the label 'strange' is not one of the training split \(bad, good, mixed\)",
        ),
        ({"label": None}, "validation.jsonl:4: the row has no label"),
        ({"text": " "}, "validation.jsonl:4: column 'text' is .* must be text"),
    ],
)
def test_mistakes_name_file_and_row(fit, recipe: Path, change: dict, reason: str):
    content = rows(50, 1)
    content[3] |= change
    write(recipe.parent / "validation.jsonl", content)
    with pytest.raises(UserError, match=reason):
        fit()


@pytest.mark.slow
def test_wrong_columns_and_numbers_are_refused(fit):
    with pytest.raises(UserError, match="no column 'review'; the columns are text, other, label"):
        fit("--data.columns.text", "review")
    with pytest.raises(UserError, match="train.jsonl:1: column 'label' is .* must be a number"):
        fit("--data.kind", "regression")
    with pytest.raises(UserError, match="the train split has no rows: give files with --data.tables.train"):
        fit("--data.tables.train", "[]")
    with pytest.raises(UserError, match="data.max_length is 512, but this network has positions for 64"):
        fit("--data.max_length", 512)
    with pytest.raises(UserError, match="matches no parameter; the first one is bert.embed"):
        fit("--model.freeze", '["*nothing*"]')


@pytest.mark.parametrize("option", [("label_smoothing", 0.1), ("class_weights", "balanced")])
def test_options_for_single_labels_are_refused_for_other_kinds(fit, option: tuple):
    flags = ("--data.kind", "regression", "--data.columns.label", "number", "--best.monitor", "val/loss")
    with pytest.raises(UserError, match=f"model.{option[0]} is only for data.kind multiclass: omit it"):
        fit(*flags, f"--model.{option[0]}", option[1])


def test_smoothing_must_leave_something_to_learn(fit):
    with pytest.raises(UserError, match="model.label_smoothing is 1.5, but must be from 0 to below 1"):
        fit("--model.label_smoothing", 1.5)


def test_what_is_cut_is_counted(cli, recipe: Path):
    out = cli("fit", "--config", recipe, "--data.max_length", 8, "--trainer.max_steps", 3)
    tokens = [len(row["text"].split()) + 2 for row in rows(300, 0)]  # each word is one, by this tokenizer
    total, truncated = sum(min(n, 8) for n in tokens), sum(n > 8 for n in tokens)
    assert f"train: 300 rows, {total:,} tokens, {truncated} rows are truncated" in out


def test_order_by_length_is_a_permutation_that_needs_little_padding():
    """Also in later epochs, which begin within a run of similar lengths."""
    size, lengths = 9_001, np.random.default_rng(0).integers(5, 100, size=9_001)

    def epoch(number: int) -> np.ndarray:
        samples = samples_at(np.arange(number * size, (number + 1) * size), size, 3)
        return by_length(samples, lengths, 3 + number, number * size)

    assert all(sorted(epoch(number)) == list(range(size)) for number in range(3))
    assert (epoch(1) == epoch(1)).all() and (epoch(1) != epoch(2)).any()
    stream = np.concatenate([epoch(number) for number in range(3)])
    batches = lengths[stream][: 3 * size // 32 * 32].reshape(-1, 32)
    assert batches.sum() / (batches.max(1) * 32).sum() > 0.97
    assert abs(np.corrcoef(np.arange(len(batches)), batches.mean(1))[0, 1]) < 0.2  # short ones do not come first
    assert sorted(by_length(np.arange(10), lengths, 3, 60)) == list(range(10))  # shorter than a run


def test_layers_below_learn_more_slowly():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8, vocab_size=20)
    network = BertForSequenceClassification(config)
    factors = {id(p): group["lr_factor"] for group in parameter_groups(network, 0.5) for p in group["params"]}
    assert len(factors) == len(list(network.parameters()))
    bert = network.bert
    assert factors[id(network.classifier.weight)] == factors[id(bert.pooler.dense.weight)] == 1
    assert factors[id(bert.encoder.layer[2].output.dense.weight)] == 0.5
    assert factors[id(bert.encoder.layer[0].output.dense.bias)] == 0.125
    assert factors[id(bert.embeddings.word_embeddings.weight)] == 0.0625


def test_the_norm_after_the_layers_learns_at_the_whole_rate():
    from transformers import GPT2Config, GPT2ForSequenceClassification

    network = GPT2ForSequenceClassification(GPT2Config(n_embd=8, n_layer=3, n_head=2, vocab_size=20, pad_token_id=0))
    factors = {id(p): group["lr_factor"] for group in parameter_groups(network, 0.5) for p in group["params"]}
    assert factors[id(network.score.weight)] == factors[id(network.transformer.ln_f.weight)] == 1
    assert factors[id(network.transformer.h[0].ln_1.weight)] == 0.125
    assert factors[id(network.transformer.wpe.weight)] == 0.0625


@pytest.mark.slow
def test_frozen_parameters_stay(fit):
    run = fit("--model.freeze", '["*embeddings*", "*layer.0*"]', "--model.layer_decay", 0.8, "--trainer.max_steps", 5)
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    other = torch.load(
        fit("--model.freeze", '["*embeddings*", "*layer.0*"]', "--trainer.max_steps", 3) / "checkpoints" / "last.ckpt",
        weights_only=True,
    )["state_dict"]
    for name, weight in state["state_dict"].items():
        frozen = "embeddings" in name or "layer.0" in name
        assert torch.equal(weight, other[name]) == frozen or name.endswith("key.bias"), name


HEAD = ("classifier.weight", "classifier.bias")


@pytest.mark.slow
@pytest.mark.parametrize(
    "lora",
    [(), pytest.param(("--model.adapter", "LoRA", "--model.adapter.rank", 2), marks=needs("lora"))],
    ids=["all weights", "lora"],
)
def test_an_equally_large_head_of_other_labels_is_replaced_and_trained(fit, cli, recipe: Path, lora: tuple):
    names = {"good": "art", "bad": "news", "mixed": "sport"}
    base = load_file(fit("--trainer.max_steps", 3) / "model" / "model.safetensors")
    run = next((recipe.parent / "runs" / "classify").iterdir())
    for split, number in (("train", 300), ("validation", 50)):
        write(recipe.parent / f"{split}.jsonl", [row | {"label": names[row["label"]]} for row in rows(number, 0)])
    flags = ("--model.network", "null", "--model.pretrained", run, "--trainer.max_steps", 1, *lora)
    flags = (*flags, "--model.schedule.warmup_steps", 0, "--model.optimizer.lr", 1e-4)
    out = cli("fit", "--config", recipe, *flags)
    assert "has a head for the labels bad, good, mixed, not for the data's art, news, sport: it is replaced" in out
    folder = Path(out.split("run folder: ")[1].splitlines()[0])
    new = load_file(folder / "model" / "model.safetensors")
    assert not torch.allclose(new[HEAD[0]], base[HEAD[0]], atol=5e-3)
    assert 0 < new[HEAD[1]].abs().max() < 2e-4  # it began at zero, and was trained
    assert json.loads((folder / "model" / "config.json").read_text())["id2label"]["0"] == "art"
    out = cli("fit", "--config", recipe, *flags, "--model.keep_head", "true", "--name", "kept")
    assert "kept head: bad is now art, good is now news, mixed is now sport" in out
    kept = load_file(Path(out.split("run folder: ")[1].splitlines()[0]) / "model" / "model.safetensors")
    assert all(torch.allclose(kept[name], base[name], atol=2e-4) for name in HEAD)
    measure = ("test", "--config", recipe, "--model.network", "null", "--model.pretrained", run)
    with pytest.raises(UserError, match=r"the label 'news' is not one of the evaluated network \(bad, good, mixed\)"):
        cli(*measure, "--data.tables.test", recipe.parent / "train.jsonl")


def test_the_head_of_another_task_is_replaced(cli, recipe: Path, tmp_path: Path, tokenizer: Path):
    """Heads of token classification have the same names of tensors."""
    from transformers import AutoTokenizer, BertConfig, BertForTokenClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    other = BertForTokenClassification(BertConfig(vocab_size=256, num_labels=3, **sizes))
    other.classifier.weight.data.fill_(9.0)
    other.save_pretrained(tmp_path / "tagger")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(tmp_path / "tagger")
    flags = ("--config", recipe, "--model.network", "null", "--model.pretrained", tmp_path / "tagger")
    out = cli("fit", *flags, "--trainer.max_steps", 3)
    assert "has a head of another task, not for the data's bad, good, mixed: it is replaced" in out
    folder = Path(out.split("run folder: ")[1].splitlines()[0])
    assert load_file(folder / "model" / "model.safetensors")[HEAD[0]].abs().max() < 1
    with pytest.raises(UserError, match="has no head for the labels bad, good, mixed: train it with `fit` first"):
        cli("test", *flags)


@pytest.mark.parametrize(
    ("kind", "metric"), [("multiclass", "accuracy"), ("multilabel", "macro_f1"), ("regression", "spearman")]
)
def test_the_recipe_chooses_the_best_checkpoint_for_each_kind(cli, recipe: Path, kind: str, metric: str):
    """As the README has it: the kind is all that is given."""
    own = yaml.safe_load(recipe.read_text())
    network, options = own["model"]["init_args"]["network"], own["data"]["init_args"]
    flags = ("--model.network", json.dumps(network), "--data.tables", json.dumps(options["tables"]))
    flags = (*flags, "--data.tokenizer.path", options["tokenizer"]["path"], "--data.max_length", 32)
    column = {"multiclass": "label", "multilabel": "several", "regression": "number"}[kind]
    flags = (*flags, "--data.kind", kind, "--data.columns.label", column, "--model.schedule.warmup_steps", 1)
    flags = (*flags, "--trainer.max_steps", 4, "--trainer.accelerator", "cpu", "--runs_dir", own["runs_dir"])
    out = cli("fit", "--config", ROOT / "configs" / "sentiment.yaml", *flags)
    run = Path(out.split("run folder: ")[1].splitlines()[0])
    assert yaml.safe_load((run / "config.yaml").read_text())["best"]["monitor"] == f"val/{metric}"
    assert (run / "checkpoints" / "best.ckpt").exists() and (run / "model" / "config.json").exists()


@pytest.mark.slow
def test_positions_after_the_row_of_padding_are_counted(fit, recipe: Path):
    """RoBERTa's first row is that of padding, whose number is 0 here."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    network = json.dumps({"model_type": "roberta", "max_position_embeddings": 32, **sizes})
    content = rows(300, 0)
    content[0]["text"] = "the " * 100  # as long as can be
    write(recipe.parent / "train.jsonl", content)
    with pytest.raises(UserError, match="data.max_length is 32, but this network has positions for 31 tokens"):
        fit("--model.network", network)
    run = fit("--model.network", network, "--data.max_length", 31, "--trainer.max_steps", 25)
    with pytest.raises(UserError, match="data.max_length is 32, but this network has positions for 31 tokens"):
        fit("--model.network", "null", "--model.pretrained", run)
