"""Evaluation: the metrics of each task do not depend on how rows are divided into batches and over processes."""

import json
import math
from pathlib import Path

import pytest
import yaml
from clauses import FIRST, sentences, write
from clauses import recipe as recipe_of
from conftest import exists, needs
from processes import Runs
from scipy.stats import pearsonr, spearmanr

from lm_lightning.data.order import PADDING
from lm_lightning.finetuning.mistakes import KEPT, Mistakes

pytestmark = pytest.mark.slow  # the first test evaluates all tasks

ROWS = 41  # no batch size and no number of processes divides them
ALL: dict[str, tuple[str, str, dict]] = {
    "single": ("Classification", "ClassificationData", {"columns": {"label": "verb"}}),
    "several": ("Classification", "ClassificationData", {"columns": {"label": "named"}, "kind": "multilabel"}),
    "number": ("Classification", "ClassificationData", {"columns": {"label": "size"}, "kind": "regression"}),
    "similarity": (
        "Classification",
        "ClassificationData",
        {"columns": {"pair": "pair", "label": "score"}, "kind": "regression"},
    ),
    "embedding": ("SentenceEncoder", "PairData", {"columns": {"score": "score"}}),
    "search": ("SentenceEncoder", "PairData", {}),
    "retrieval": ("SentenceEncoder", "PairData", {"retrieval": {}}),
    "tagging": ("Tagging", "TaggingData", {}),
    "plain": ("Tagging", "TaggingData", {"columns": {"labels": "upos"}}),
    "roles": ("Tagging", "RoleData", {}),
    "parsing": ("Parser", "ParsingData", {}),
    "questions": ("QuestionAnswering", "QuestionData", {"max_length": 30, "overlap": 4, "max_question": 12}),
    "gpt": ("CausalLM", "PretrainingData", {"block_size": 16}),
    "bert": ("MaskedLM", "MaskedData", {"block_size": 16}),
    "pairs": ("MaskedLM", "MaskedData", {"block_size": 32, "next_sentence": True}),
}
PACKAGES = {"ClassificationData": "tasks.classification", "PairData": "tasks.embedding", "TaggingData": "tasks.tagging"}
PACKAGES |= {"RoleData": "tasks.tagging", "ParsingData": "tasks.parsing", "QuestionData": "tasks.questions"}
PACKAGES |= {"MaskedData": "tasks.masked_lm", "PretrainingData": "data"}
TASKS = {name: task for name, task in ALL.items() if exists(PACKAGES[task[1]])}
MEASURED = {
    "single": {"loss", "accuracy", "macro_f1", "matthews"},
    "several": {"loss", "exact_match", "macro_f1"},
    "number": {"loss", "pearson", "spearman", "mae"},
    "similarity": {"loss", "pearson", "spearman", "mae"},
    "embedding": {"loss", "pearson", "spearman"},
    "search": {"loss", "ndcg_10", "mrr_10", "recall_100"},
    "retrieval": {"ndcg_10", "mrr_10", "recall_100"},
    "tagging": {"loss", "f1", "macro_f1", "precision", "recall"},
    "plain": {"loss", "f1", "macro_f1", "accuracy"},
    "roles": {"loss", "f1", "macro_f1", "precision", "recall"},
    "parsing": {"loss", "uas", "las"},
    "questions": {"loss", "exact_match", "f1"},
    "gpt": {"loss", "perplexity", "bits_per_byte"},
    "bert": {"loss", "perplexity", "accuracy"},
    "pairs": {"loss", "perplexity", "accuracy", "next_sentence_loss", "next_sentence_accuracy"},
}


def content(number: int, seed: int) -> list[dict]:
    """Sentences with a column for each task."""
    rows = sentences(number, seed)
    for row, other in zip(rows, [*rows[1:], rows[0]]):
        verb = next(word for word, tag in zip(row["words"], row["upos"]) if tag == "VERB")
        text, pair = " ".join(row["words"]), " ".join(other["words"])
        answer = row["words"][-1]
        row |= {"text": text, "pair": pair, "verb": verb, "size": len(row["words"]) / 7, "score": len(text) % 6}
        row |= {"named": [name for name in FIRST if name in row["words"]], "context": text, "question": f"{verb} who"}
        row["answers"] = [{"text": answer, "answer_start": text.rindex(answer)}]
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipes, by the names of the tasks, of networks without dropout that train a few steps."""
    folder = tmp_path_factory.mktemp("evaluation")
    base = yaml.safe_load(recipe_of(folder, "Classification", "ClassificationData", "val/loss").read_text())
    rows = {"train": content(120, 0), "validation": content(ROWS, 1)}
    tables = {split: str(write(folder / f"{split}.jsonl", part)) for split, part in rows.items()}
    corpus = folder / "text.txt"
    paragraphs = [". ".join(row["text"] for row in part) + "." for part in zip(*[iter(content(900, 2))] * 3)]
    corpus.write_text("\n\n".join(paragraphs))
    documents = [{"_id": str(n), "text": row["pair"]} for n, row in enumerate(rows["validation"])]
    asked = [{"_id": str(n), "text": row["text"]} for n, row in enumerate(rows["validation"])]
    retrieval = {
        name: str(write(folder / f"{name}.jsonl", r)) for name, r in (("corpus", documents), ("queries", asked))
    }
    qrels = "".join(f"{n}\t{n}\t1\n" for n in range(ROWS))
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    for name, (model, data, options) in TASKS.items():
        own = json.loads(json.dumps(base))
        own["model"]["class_path"], own["data"]["class_path"] = model, data
        own["model"]["init_args"]["network"] |= off
        if "block_size" in options:
            own["data"]["init_args"] = {"tokenizer": base["data"]["init_args"]["tokenizer"]}
            splits = {"paths": str(corpus), "validation_fraction": 0.3, "test_fraction": 0.0}
            own["data"]["init_args"] |= {"corpus": splits, "cache_dir": str(folder / "cache")}
        else:
            own["data"]["init_args"]["tables"] = tables
        own["data"]["init_args"] |= options | (
            {"retrieval": retrieval | {"validation": str(folder / "qrels.tsv")}} if name == "retrieval" else {}
        )
        if model == "CausalLM":
            own["model"]["init_args"]["network"] = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2}
        del own["best"]
        steps = 40 if name == "several" else 6
        own["trainer"] |= {"max_steps": steps, "val_check_interval": steps}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(own))
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, list[dict]]:
    """Of each task what one process finds with 1 row a batch and with 32, and what two find with 8.

    Two processes are started for all tasks, as is the one that trains their networks.
    """
    runs, commands = Runs(folder), {}
    for task in TASKS:
        config = ("--config", folder / f"{task}.yaml")
        commands[f"one-{task}"] = ("fit", *config)
        for name, batch_size in ((f"one-{task}-1", 1), (f"one-{task}-32", 32), (f"two-{task}-8", 8)):
            noted = {"class_path": "processes.Noted", "init_args": {"file": str(folder / f"{name}.json")}}
            checkpoint = folder / f"one-{task}" / "checkpoints" / "last.ckpt"
            flags = ("--ckpt_path", checkpoint, "--data.batch_size", batch_size)
            strategy = ("--trainer.strategy", "ddp", "--trainer.devices", 2) if name.startswith("two") else ()
            commands[name] = ("validate", *config, *flags, *strategy, "--trainer.callbacks", json.dumps([noted]))
        if task in ("single", "several", "number"):
            predict = ("--data.tables.predict", folder / "validation.jsonl", "--ckpt_path", checkpoint)
            commands[f"one-{task}-predict"] = ("predict", *config, *predict)
    runs(commands)
    for name in commands:
        assert not runs.error(name), runs.error(name)
    names = {task: [f"one-{task}-1", f"one-{task}-32", f"two-{task}-8"] for task in TASKS}
    return {
        task: [json.loads((folder / f"{name}.json").read_text()) for name in of_task] for task, of_task in names.items()
    }


@pytest.mark.parametrize("task", TASKS)
def test_metrics_do_not_depend_on_batches_and_processes(found: dict, folder: Path, task: str):
    first, *others = found[task]
    monitor = yaml.safe_load((folder / f"one-{task}" / "config.yaml").read_text())["best"]["monitor"]
    assert monitor.removeprefix("val/") in first["values"]  # what the best checkpoint is chosen by if nothing is said
    assert MEASURED[task] <= first["values"].keys() and all(map(math.isfinite, first["values"].values()))
    for other in others:
        assert other["values"] == pytest.approx(first["values"], rel=1e-4, abs=1e-4)
        assert other["tables"] == first["tables"] and other["mistakes"] == first["mistakes"]


def predictions(folder: Path, task: str) -> list[dict]:
    return [json.loads(line) for line in next(folder.glob(f"one-{task}*/predictions.jsonl")).read_text().splitlines()]


@needs("tasks.classification")
def test_metrics_of_several_labels_are_those_of_the_definitions(found: dict, folder: Path):
    rows, told = content(ROWS, 1), [set(row["labels"]) for row in predictions(folder, "several")]
    gold, f1 = [set(row["named"]) for row in rows], []
    assert any(told) and set() in gold
    for name in FIRST:
        both, either = (sum((name in t) + (name in g) > n for t, g in zip(told, gold)) for n in (1, 0))
        f1.append(2 * both / (both + either) if either else 0.0)
    values = found["several"][1]["values"]
    assert values["exact_match"] == pytest.approx(sum(map(set.__eq__, told, gold)) / ROWS, abs=1e-6)
    assert values["macro_f1"] == pytest.approx(sum(f1) / len(FIRST), abs=1e-6)


@needs("tasks.classification")
def test_metrics_of_numbers_are_those_of_the_definitions(found: dict, folder: Path):
    told, gold = [row["score"] for row in predictions(folder, "number")], [row["size"] for row in content(ROWS, 1)]
    values = found["number"][1]["values"]
    expected = {"pearson": pearsonr(told, gold)[0], "spearman": spearmanr(told, gold)[0]}
    expected |= {"mae": sum(abs(t - g) for t, g in zip(told, gold)) / ROWS}
    assert {name: values[name] for name in expected} == pytest.approx(expected, abs=1e-5)


@needs("tasks.classification", "tasks.tagging")
def test_mistakes_are_the_rows_that_are_predicted_wrongly(found: dict, folder: Path):
    rows, told = content(ROWS, 1), predictions(folder, "single")
    wrong = {
        str(n): [row["verb"], own["label"]]
        for n, (row, own) in enumerate(zip(rows, told))
        if row["verb"] != own["label"]
    }
    assert wrong and found["single"][1]["mistakes"] == wrong
    lines = [json.loads(line) for line in (folder / "one-single" / "mistakes.jsonl").read_text().splitlines()]
    assert all(line["text"] == rows[line["row"]]["text"] for line in lines)
    losses = [line["loss"] for line in lines]
    expected = [-math.log(told[line["row"]]["scores"][line["correct"]]) for line in lines]
    assert losses == pytest.approx(expected, abs=1e-4) and losses == sorted(losses, reverse=True)
    (spans,) = [values for row, values in found["tagging"][1]["mistakes"].items() if row == "25"]
    assert spans[0] != spans[1] and set(spans[0].replace(":", "").replace(";", "").split()) - {"PER", "LOC"} <= set(
        rows[25]["words"]
    )


def test_only_the_worst_mistakes_are_kept():
    mistakes = Mistakes()
    for number in [*range(200), PADDING, PADDING]:
        mistakes.add(number, float(number * 37 % 200), "right", "wrong")
    mistakes.add(300, math.nan, "right", "wrong")
    assert sorted(loss for loss, *_ in mistakes.kept) == list(range(200 - KEPT, 200))
