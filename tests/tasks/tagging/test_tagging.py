"""Tagging: legal spans, scored as seqeval and CoNLL do, and plain transformers tells the same labels."""

import csv
import itertools
import json
import random
import subprocess
from pathlib import Path

import pytest
import torch
from clauses import recipe as recipe_of
from clauses import sentences, write
from conftest import command, evaluation
from forks import python
from seqeval import metrics as seqeval
from seqeval.metrics.sequence_labeling import get_entities

from lm_lightning.errors import UserError
from lm_lightning.finetuning.tables import Row
from lm_lightning.tasks.tagging.data import TaggingData, encoded, spans_of
from lm_lightning.tasks.tagging.viterbi import decode, legal

BIO = ["B-A", "B-B", "I-A", "I-B", "O"]
BIOES = ["B-A", "E-A", "I-A", "O", "S-A"]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return recipe_of(tmp_path, "Tagging", "TaggingData", "val/f1")


def is_legal(labels: tuple[str, ...], closed: bool) -> bool:
    """By the definition of the schemes, word by word."""
    inside = None
    for label in labels:
        prefix, _, kind = label.partition("-")
        if prefix in ("I", "E"):
            if inside != kind:
                return False
        elif closed and inside is not None:
            return False
        inside = kind if prefix in ("B", "I") else None
    return not (closed and inside is not None)


@pytest.mark.parametrize(("labels", "scheme"), [(BIO, "bio"), (BIOES, "bioes")])
def test_decoded_labels_are_the_best_of_all_legal_ones(labels: list[str], scheme: str):
    torch.manual_seed(0)
    scores, lengths = torch.randn(20, 4, len(labels)) * 3, torch.tensor([4, 1, 2, 3] * 5)
    predicted = decode(scores, lengths, legal(labels, scheme))
    for row, length, own in zip(scores, lengths.tolist(), predicted):
        sequences = [
            numbers
            for numbers in itertools.product(range(len(labels)), repeat=length)
            if is_legal(tuple(labels[number] for number in numbers), scheme == "bioes")
        ]
        best = max(sequences, key=lambda numbers: sum(row[word, number] for word, number in enumerate(numbers)))
        assert own.tolist() == [*best, *[-100] * (4 - length)]


@pytest.mark.parametrize("labels", [BIO, BIOES])
def test_spans_are_those_of_seqeval(labels: list[str]):
    draw = random.Random(0)
    for _ in range(500):
        row = draw.choices(labels, k=draw.randint(1, 8))  # legal or not
        assert [(kind, start, end - 1) for kind, (start, end) in spans_of(row)] == get_entities(row)


@pytest.mark.slow
def test_names_are_learned_scored_as_by_seqeval_and_told_by_the_pipeline(fit, cli, recipe: Path, tmp_path: Path):
    run = fit("--trainer.max_steps", 25)  # not yet perfect
    gold = sentences(45, 2)
    # The longest sentences are truncated, and what should be there counts as false negatives.
    flags = ("--config", recipe, "--ckpt_path", run / "checkpoints" / "best.ckpt", "--data.max_length", 14)
    out = cli("test", *flags)
    assert "words are truncated, and count as false negatives" in out
    cli("predict", *flags)
    predicted = [json.loads(line) for line in (evaluation(run) / "predictions.jsonl").read_text().splitlines()]
    assert [len(row["labels"]) for row in predicted] == [len(row["words"]) for row in gold]
    own = [[label or "O" for label in row["labels"]] for row in predicted]
    assert any(None in row["labels"] for row in predicted)
    f1 = seqeval.f1_score([row["labels"] for row in gold], own)
    assert 0.2 < f1 < 1
    (line,) = [line for line in out.splitlines() if "test/f1" in line]
    assert float(line.split("│")[2]) == pytest.approx(f1, abs=1e-6)
    # The loss is that of the words that are there.
    kept = [[n for n, label in enumerate(row["labels"]) if label is not None] for row in predicted]
    short = [{k: [row[k][n] for n in own] for k in ("words", "labels")} for row, own in zip(gold, kept)]
    again = cli("test", *flags, "--data.tables.test", write(tmp_path / "short.jsonl", short))
    losses = [line.split("│")[2] for text in (out, again) for line in text.splitlines() if "test/loss" in line]
    assert float(losses[0]) == pytest.approx(float(losses[1]), abs=1e-6)

    cli("test", *flags)
    with open(evaluation(run, "test") / "results.csv", newline="") as file:
        assert {row["label"]: int(row["rows"]) for row in csv.DictReader(file)} == {
            kind: sum(label == f"B-{kind}" for row in gold for label in row["labels"]) for kind in ("LOC", "PER")
        }

    script = """
import json, sys
from transformers import pipeline
tell = pipeline("token-classification", sys.argv[1], device="cpu", ignore_labels=[])
print(json.dumps([[(w["entity"], float(w["score"]), w["start"]) for w in tell(text)] for text in json.load(sys.stdin)]))
assert "lm_lightning" not in sys.modules
"""
    cli("predict", *flags, "--data.max_length", 60)
    predicted = [json.loads(line) for line in (evaluation(run) / "predictions.jsonl").read_text().splitlines()]
    texts = [" ".join(row["words"]) for row in gold]
    done = subprocess.run(
        [python("transformers"), "-c", script, run / "model"], input=json.dumps(texts), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    same = 0
    for row, row_predicted, tokens in zip(gold, predicted, json.loads(done.stdout.splitlines()[-1])):
        starts = list(itertools.accumulate((len(word) + 1 for word in row["words"]), initial=0))
        first = {start: (label, score) for label, score, start in reversed(tokens)}
        for start, label, score in zip(starts, row_predicted["labels"], row_predicted["scores"]):
            if label == first[start][0]:  # the pipeline knows no rules
                assert score == pytest.approx(first[start][1], abs=1e-5)
                same += 1
    assert same > 0.9 * sum(len(row["words"]) for row in gold)


@pytest.mark.slow
def test_two_processes_score_what_one_does(fit, recipe: Path):
    off = ("--model.network.hidden_dropout_prob", 0, "--model.network.attention_probs_dropout_prob", 0)
    flags = (*off, "--trainer.max_steps", 10, "--trainer.val_check_interval", 5)
    one = fit("--name", "one", *flags)
    done = command(
        *("fit", "--config", recipe, *flags, "--name", "two", "--trainer.strategy", "ddp", "--trainer.devices", 2),
        *("--data.batch_size", 16),
    )
    assert done.returncode == 0, done.stderr
    (two,) = (recipe.parent / "runs" / "two").iterdir()
    values = []
    for run in (one, two):
        with open(run / "metrics.csv", newline="") as file:
            names = ("train/loss", "val/loss", "val/f1", "val/macro_f1", "val/precision")
            values.append([float(row[name]) for row in csv.DictReader(file) for name in names if row[name]])
    assert len(values[0]) == 10 + 2 * 4 and values[0] == pytest.approx(values[1], abs=1e-4)


@pytest.mark.slow
def test_parts_of_speech_of_conllu_are_plain_labels(fit, cli, recipe: Path, tmp_path: Path):
    for split, seed in (("train", 0), ("validation", 1)):
        lines = []
        for number, row in enumerate(sentences(100, seed), start=1):
            lines += [f"# sent_id = {number}", "1-2\tannasmith\t" + "\t".join("_" * 8)]
            lines += [
                f"{n}\t{word}\t_\t{tag}\t_\t_\t{head}\t{relation}\t_\t_"
                for n, (word, tag, head, relation) in enumerate(
                    zip(row["words"], row["upos"], row["head"], row["deprel"]), start=1
                )
            ]
            lines += ["1.1\tempty\t" + "\t".join("_" * 8), ""]
        (tmp_path / f"{split}.conllu").write_text("\n".join(lines) + "\n")
    files = [f"--data.tables.{split}={tmp_path / f'{split}.conllu'}" for split in ("train", "validation")]
    columns = ("--data.columns.words", "form", "--data.columns.labels", "upos")
    run = fit(*files, *columns, "--best.monitor", "val/accuracy", "--trainer.max_steps", 60)
    with open(run / "metrics.csv", newline="") as file:
        values = [float(row["val/accuracy"]) for row in csv.DictReader(file) if row["val/accuracy"]]
    assert values[-1] > 0.9
    config = json.loads((run / "model" / "config.json").read_text())
    assert set(config["label2id"]) == {"PROPN", "DET", "NOUN", "VERB", "CCONJ", "ADP"}


def test_spans_that_begin_with_i_are_converted_and_counted(cli, recipe: Path):
    rows = sentences(60, 3)
    for row in rows:
        row["labels"] = [f"I{label[1:]}" if label.startswith("B-PER") else label for label in row["labels"]]
    file = write(recipe.parent / "iob1.jsonl", rows)
    flags = ("--data.tables.train", file, "--trainer.max_steps", 6, "--trainer.limit_val_batches", 0)
    out = cli("fit", "--config", recipe, *flags)
    people = sum(sum(kind == "PER" for kind, _ in spans_of(row["labels"])) for row in rows)
    assert (
        f"train: {people} labels were converted to the scheme bio" in out
        and "no label begins with B- or S- for PER" in out
    )


def test_labels_i_alone_mark_spans(fit, cli, recipe: Path):
    """As in the scheme IO: they are scored as spans, by which a word is not right because it is outside."""
    for split in ("train", "validation"):
        rows = sentences(60, len(split))
        for row in rows:
            row["labels"] = [label.replace("B-", "I-") for label in row["labels"]]
        write(recipe.parent / f"{split}.jsonl", rows)
    out = cli("fit", "--config", recipe, "--trainer.max_steps", 6, "--trainer.val_check_interval", 6)
    assert "no label begins with B- or S- for LOC, PER: only I- and E- mark these spans" in out
    run = Path(next(line for line in out.splitlines() if line.startswith("run folder: ")).split(": ", 1)[1])
    config = json.loads((run / "model" / "config.json").read_text())
    assert set(config["label2id"]) == {"O", "B-PER", "I-PER", "B-LOC", "I-LOC"}
    with open(run / "results.csv", newline="") as file:
        counts = {row["label"]: int(row["rows"]) for row in csv.DictReader(file)}
    kinds = [kind for row in rows for kind, _ in spans_of(row["labels"])]
    assert counts == {"PER": kinds.count("PER"), "LOC": kinds.count("LOC")}  # and no O


@pytest.mark.parametrize(("scheme", "prefixes"), [("bio", "BI"), ("bioes", "BIES")])
def test_spans_of_any_labels_become_legal_ones_of_the_same_spans(scheme: str, prefixes: str):
    labels = ["O", *(f"{prefix}-{kind}" for prefix in prefixes for kind in "XY")]
    for given in itertools.product(labels, repeat=3):
        own = encoded(spans_of(given), 3, scheme)
        assert spans_of(own) == spans_of(given) and is_legal(tuple(own), scheme == "bioes")
        if is_legal(given, scheme == "bioes"):
            assert own == list(given)


@pytest.mark.parametrize(
    ("labels", "scheme"),
    [
        ("O I-X", "bio"),
        ("O I-X B-X", "bio"),
        ("B-X I-X", "bio"),
        ("O E-X I-X", "bioes"),
        ("O S-X", "bioes"),
        ("NOUN VERB", "plain"),
        ("O NOUN", "plain"),
        ("N O S E L U V", "plain"),
        ("I-1 S-2", "plain"),
        ("B I O", "look like labels of spans"),
        ("o b-per i-per", "look like labels of spans"),
        ("O PER-B PER-I", "look like labels of spans"),
        ("O B_PER I_PER", "look like labels of spans"),
        ("O B-X I-X L-X U-X", "labels such as L-X look like labels of spans"),
        ("O B-X PER", "some labels mark spans .such as B-X. and some do not .such as PER"),
    ],
)
def test_schemes_are_told_by_the_labels(labels: str, scheme: str):
    if " " not in scheme:
        assert TaggingData().detect_scheme(set(labels.split())) == scheme
        return
    with pytest.raises(UserError, match=f"{scheme}.*--data.scheme plain"):
        TaggingData().detect_scheme(set(labels.split()))


def test_a_network_that_cannot_begin_a_span_is_not_scored_by_spans(cli, fit, recipe: Path):
    run = fit("--data.scheme", "plain", "--trainer.max_steps", 6, "--best.monitor", "val/accuracy")
    config = run / "model" / "config.json"
    config.write_text(config.read_text().replace("B-PER", "E-PER"))
    flags = ("--data.tables.train", "[]", "--data.scheme", "auto")  # the run itself was of plain ones
    with pytest.raises(UserError, match="has a label I-PER, but no B-PER .* --data.scheme plain"):
        cli("test", "--config", recipe, "--model.network", "null", "--model.pretrained", run, *flags)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ["B-PER"]}, "validation.jsonl:1: there are 2 words, but 1 labels"),
        ({"labels": ["B-PER", "B-DOG"]}, "validation.jsonl:1: the label 'B-DOG' is not one of the training split"),
        ({"labels": ["X-PER", "O"]}, "validation.jsonl:1: the label 'X-PER' is not one of the training split"),
        ({"labels": ["PER", "O"]}, "validation.jsonl:1: the label 'PER' is not one of the training split"),
        ({"words": []}, "validation.jsonl:1: column 'words' is .* must be a list of words"),
        ({"words": None}, "validation.jsonl:1: column 'words' is .* must be a list of words"),
        ({"words": ["two", 3]}, "validation.jsonl:1: column 'words' is .* must be a list of words"),
    ],
)
def test_bad_rows_are_named(fit, recipe: Path, change: dict, message: str):
    write(recipe.parent / "validation.jsonl", [{"words": ["anna", "sees"], "labels": ["B-PER", "O"]} | change])
    with pytest.raises(UserError, match=message):
        fit()


@pytest.mark.parametrize(
    ("label", "flags", "message"),
    [
        ("PER", (), "some labels mark spans .* and some do not .such as PER"),
        ("S-PER", ("--data.scheme", "bio"), "train.jsonl:2: the label 'S-PER' does not belong to the scheme bio"),
    ],
)
def test_labels_of_two_schemes_are_refused(fit, recipe: Path, label: str, flags: tuple, message: str):
    rows = [{"words": ["anna", "smith"], "labels": ["B-PER", "I-PER"]}, {"words": ["boris"], "labels": [label]}]
    write(recipe.parent / "train.jsonl", rows)
    with pytest.raises(UserError, match=message):
        fit(*flags)


def test_labels_that_are_numbers_or_missing():
    assert TaggingData().labels_of(Row({"labels": [0, 3, 0]}, ""), "labels") == ["0", "3", "0"]  # as on the Hub
    with pytest.raises(UserError, match="a.csv:3: column 'labels' is .* must be a list of labels"):
        TaggingData().labels_of(Row({"labels": ["O", None]}, "a.csv:3"), "labels")
