"""Extractive question answering: answers are slices of the text, scored as by the official scripts."""

import collections
import csv
import json
import random
import re
import string
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import command, evaluation
from forks import python

from lm_lightning.data.tokenizer import Tokenizer, train
from lm_lightning.errors import UserError
from lm_lightning.finetuning.tables import Tables, read_files
from lm_lightning.tasks.questions.data import Answer, Question, QuestionData, Window
from lm_lightning.tasks.questions.model import best_spans, best_threshold, cmrc, join, squad

NAMES = ["anna", "boris", "clara", "david", "emil", "frida"]
FILLER = ["the", "river", "was", "long", "and", "🙂", "the", "cafe\u0301", "on", "the", "hill", "had", "two", "doors"]


def squad_file(path: Path, number: int, seed: int, unanswerable: bool = True) -> Path:
    """Questions like SQuAD's: who owns a thing, in contexts of up to 60 words with emoji and combining marks."""
    draw, paragraphs = random.Random(seed), []
    for i in range(number):
        words = draw.choices(FILLER, k=draw.randint(5, 60))
        name, empty = draw.choice(NAMES), unanswerable and i % 4 == 3
        place = draw.randint(0, len(words))
        context = " ".join(words[:place] + ([] if empty else ["owner", name]) + words[place:])
        start = 0 if empty else context.index(f"owner {name}") + 6
        answers = [] if empty else [{"text": name, "answer_start": start}] * 2
        qas = [{"id": f"q{seed}-{i}", "question": "who is the owner", "answers": answers, "is_impossible": empty}]
        paragraphs.append({"context": context, "qas": qas})
    content = {"version": "v2.0", "data": [{"title": "t", "paragraphs": paragraphs}]}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def flat(path: Path) -> list[tuple[str, dict]]:
    """Context and question of each."""
    (article,) = json.loads(path.read_text())["data"]
    return [(paragraph["context"], question) for paragraph in article["paragraphs"] for question in paragraph["qas"]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [" ".join(FILLER + NAMES + ["who is the owner"])] * 5
    train(Tokenizer(algorithm="wordpiece", vocab_size=150, lowercase=True), iter(texts), "bert").save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path: Path, tokenizer: Path) -> Path:
    """A tiny BERT with windows of 32 tokens, so that most questions have several."""
    files = {
        split: [str(squad_file(tmp_path / f"{split}.json", n, i))]
        for i, (split, n) in enumerate({"train": 300, "validation": 40, "test": 41}.items())
    }
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    network = {"model_type": "bert", "max_position_embeddings": 64, **sizes}
    content = {
        "model": {
            "class_path": "QuestionAnswering",
            "init_args": {
                "network": network,
                "max_answer": 8,
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-3}},
                "schedule": {"warmup_steps": 2, "shape": "constant"},
            },
        },
        "data": {
            "class_path": "QuestionData",
            "init_args": {
                **{"tables": files, "tokenizer": {"path": str(tokenizer)}, "batch_size": 16},
                **{"max_length": 32, "overlap": 8, "max_question": 8},
            },
        },
        "best": {"monitor": "val/f1"},
        "trainer": {
            **{"max_steps": 20, "val_check_interval": 20, "check_val_every_n_epoch": None, "log_every_n_steps": 1},
            **{"accelerator": "cpu", "precision": "32-true"},
        },
        "runs_dir": str(tmp_path / "runs"),
    }
    file = tmp_path / "answer.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def predictions(run: Path) -> list[dict]:
    return [
        json.loads(line) for line in (evaluation(run) / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    ]


PLAIN = """
import json, sys, torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer
model, tokenizer = (c.from_pretrained(sys.argv[1]) for c in (AutoModelForQuestionAnswering, AutoTokenizer))
model.eval()
answers = []
for question, context in json.load(sys.stdin):
    encoded = tokenizer(question, context, truncation="only_second", max_length=32, stride=8, padding="max_length",
                        return_overflowing_tokens=True, return_offsets_mapping=True, return_tensors="pt")
    offsets = encoded.pop("offset_mapping").tolist()
    encoded.pop("overflow_to_sample_mapping")
    with torch.no_grad():
        out = model(**encoded)
    found, none = [], []
    for w, spans in enumerate(offsets):
        own = [i for i, sequence in enumerate(encoded.sequence_ids(w)) if sequence == 1]
        s, e = out.start_logits[w].tolist(), out.end_logits[w].tolist()
        none.append(s[0] + e[0])
        found += [(s[i] + e[j], spans[i][0], spans[j][1]) for i in own for j in own if i <= j < i + 8]
    answers.append([*max(found), min(none)])
assert "lm_lightning" not in sys.modules
print(json.dumps(answers))
"""


@pytest.mark.slow
def test_answers_are_learned_and_plain_transformers_finds_the_same(fit, cli, recipe: Path):
    run = fit("--trainer.max_steps", 200, "--trainer.val_check_interval", 100)
    out = cli("test", "--config", recipe, "--ckpt_path", run / "checkpoints" / "best.ckpt")
    cli("predict", "--config", recipe, "--ckpt_path", run / "checkpoints" / "best.ckpt")
    predicted, gold = predictions(run), flat(recipe.parent / "test.json")
    assert [row["id"] for row in predicted] == [question["id"] for _, question in gold]
    pairs = [(question["question"], context) for context, question in gold]
    result = subprocess.run(
        [python("transformers"), "-c", PLAIN, str(run / "model")],
        input=json.dumps(pairs),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    for row, (context, _), (score, start, end, none) in zip(
        predicted, gold, json.loads(result.stdout.splitlines()[-1])
    ):
        assert (row["score"], row["no_answer_score"]) == pytest.approx((score, none), abs=1e-4)
        # the tokenizer takes the accent off; the answer has it again
        assert row["start"] == start and row["end"] in (end, end + 1)
        assert row["answer"] in ("", context[row["start"] : row["end"]])
        assert (row["answer"] == "") == (row["no_answer_score"] > row["score"])
    scores = [
        squad(row["answer"], [a["text"] for a in question["answers"]]) for row, (_, question) in zip(predicted, gold)
    ]
    exact, f1 = np.mean(scores, axis=0)
    assert exact > 0.8
    for name, value in {"exact_match": exact, "f1": f1}.items():
        shown = next(line for line in out.splitlines() if f"test/{name} " in line).split("│")[2]
        assert float(shown) == pytest.approx(value, abs=1e-5)
    with open(evaluation(run, "test") / "results.csv", newline="") as file:
        table = {row["questions"]: row for row in csv.DictReader(file)}
    assert {name: int(row["rows"]) for name, row in table.items()} == {
        **{"all": 41, "with an answer": 31, "without an answer": 10}
    }
    assert (evaluation(run, "test") / "results.md").read_text().splitlines()[
        2
    ] == "| questions | exact match | F1 | rows |"


@pytest.mark.slow
def test_two_processes_join_windows_as_one_does(fit, cli, recipe: Path):
    off = ("--model.network.hidden_dropout_prob", 0, "--model.network.attention_probs_dropout_prob", 0)
    one = fit("--name", "one", *off)
    ddp = ("--trainer.strategy", "ddp", "--trainer.devices", 2, "--data.batch_size", 4)
    flags = ("--data.batch_size", 4, "--trainer.accumulate_grad_batches", 2)
    result = command("fit", "--config", recipe, *off, *ddp, *flags, "--name", "two", "--trainer.val_check_interval", 20)
    assert result.returncode == 0, result.stderr
    (two,) = (recipe.parent / "runs" / "two").iterdir()
    values = []
    for run in (one, two):
        with open(run / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        names = ("train/loss", "val/loss", "val/exact_match", "val/f1", "val/best_f1", "val/best_threshold")
        values.append([float(row[name]) for row in rows for name in names if row[name]])
    assert len(values[0]) == 20 + 5 and values[0] == pytest.approx(values[1], abs=1e-3)
    predicted = []
    for more in ((), ddp):
        checkpoint = one / "checkpoints" / "last.ckpt"
        flags = ("predict", "--config", recipe, "--ckpt_path", checkpoint, *more)
        if more:
            assert command(*flags).returncode == 0
        else:
            cli(*flags)
        predicted.append(predictions(one))
    assert len(predicted[0]) == 41
    for a, b in zip(*predicted, strict=True):
        assert a["id"] == b["id"] and a["score"] == pytest.approx(b["score"], abs=1e-4)


def test_best_spans_are_those_of_all_pairs():
    torch.manual_seed(0)
    logits, of_context = torch.randn(2, 5, 20), torch.rand(5, 20) > 0.3
    of_context[:, 0] = False
    for longest in (1, 3, 50):
        places, scores = best_spans(logits, of_context, longest)
        for row in range(5):
            own = of_context[row].nonzero().flatten().tolist()
            pairs = {(i, j): logits[0, row, i] + logits[1, row, j] for i in own for j in own if i <= j < i + longest}
            best = max(pairs, key=lambda pair: pairs[pair])
            assert tuple(places[row].tolist()) == best and scores[row, 0] == pairs[best]
            assert scores[row, 1] == logits[:, row, 0].sum()


def test_windows_are_joined_in_any_order():
    context = "🙂🙂 un cafe\u0301 noir"
    offsets = np.array([[0, 0], [0, 2], [3, 5], [6, 10], [12, 16]])
    questions = [Question("a", context, [Answer("cafe\u0301", 6)]), Question("b", context, [])]
    windows = [Window(0, offsets), Window(1, offsets), Window(0, offsets), Window(0, offsets)]
    places, scores = [[3, 1, 1], [2, 3, 3], [1, 2, 3], [-1, 0, 0], [2, 3, 3]], [[1.0, 4.0], [3.0, 5.0], [0.0, 9.0]]
    scores += [[99.0, -99.0], [3.0, 5.0]]
    spans = join(questions, windows, places, scores)
    assert spans[0] == ("cafe\u0301", 6, 11, 3.0, 4.0) and context[6:11] == "cafe\u0301"
    assert spans[1] == ("un cafe\u0301", 3, 11, 0.0, 9.0) and len(spans) == 2


# What the official scripts do, written again from their rules, to compare with.


def official_normalize(s):
    def remove_articles(text):
        return re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", text)

    def white_space_fix(text):
        return " ".join(text.split())

    def remove_punc(text):
        exclude = set(string.punctuation)
        return "".join(ch for ch in text if ch not in exclude)

    return white_space_fix(remove_articles(remove_punc(s.lower())))


def official_v2(predicted: str, answers: list[str]) -> tuple[float, float]:
    """compute_exact and compute_f1 of evaluate-v2.0.py."""

    def tokens(s):
        return official_normalize(s).split() if s else []

    def f1(gold, pred):
        gold, pred = tokens(gold), tokens(pred)
        same = sum((collections.Counter(gold) & collections.Counter(pred)).values())
        if len(gold) == 0 or len(pred) == 0:
            return int(gold == pred)
        if same == 0:
            return 0
        precision, recall = same / len(pred), same / len(gold)
        return (2 * precision * recall) / (precision + recall)

    gold = [a for a in answers if official_normalize(a)] or [""]
    return max(int(official_normalize(a) == official_normalize(predicted)) for a in gold), max(
        f1(a, predicted) for a in gold
    )


PIECES = [
    "the",
    "A",
    "an",
    " ",
    "  ",
    "\t",
    "\u00a0",
    "café",
    "cafe\u0301",
    "U.S.",
    "-",
    "“x”",
    "5½",
    "🙂",
    "The",
    ",",
    "b",
]
PIECES += ["theatre", "'s", "1,000", "İ", "ß", "\n", "x"]


def drawn(draw: random.Random, pieces: list[str]) -> str:
    return "".join(draw.choices(pieces, k=draw.randint(0, 7)))


def test_scores_are_those_of_the_official_script():
    from torchmetrics.text import SQuAD

    draw, first = random.Random(0), SQuAD()
    for _ in range(3000):
        predicted, answers = drawn(draw, PIECES), [drawn(draw, PIECES) for _ in range(draw.randint(0, 3))]
        if answers and draw.random() < 0.3:
            predicted = answers[0] + draw.choice(["", ".", " the", " x"])
        assert squad(predicted, answers) == pytest.approx(official_v2(predicted, answers)), (predicted, answers)
        if official_normalize(predicted) and answers and all(map(official_normalize, answers)):
            gold = {"answers": {"text": answers, "answer_start": [0] * len(answers)}, "id": "0"}
            first.reset()
            first.update([{"prediction_text": predicted, "id": "0"}], [gold])
            assert [v * 100 for v in squad(predicted, answers)] == pytest.approx(
                [*map(float, first.compute().values())]
            )


def official_cmrc(predicted: str, answers: list[str]) -> tuple[float, float]:
    """calc_em_score and calc_f1_score of cmrc2018_evaluate.py, with words at white space in the place of NLTK's."""
    marks = list("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』") + ["……"]

    def segmented(text):
        out, word = [], ""
        for character in text.lower().strip():
            if character in marks:
                continue
            if re.search("[\u4e00-\u9fa5]", character):
                out, word = [*out, *word.split(), character], ""
            else:
                word += character
        return out + word.split()

    def f1(a, b):
        table, longest = [[0] * (len(b) + 1) for _ in range(len(a) + 1)], 0
        for i in range(len(a)):
            for j in range(len(b)):
                if a[i] == b[j]:
                    table[i + 1][j + 1] = table[i][j] + 1
                    longest = max(longest, table[i + 1][j + 1])
        if longest == 0:
            return 0
        precision, recall = longest / len(b), longest / len(a)
        return (2 * precision * recall) / (precision + recall)

    def bare(text):
        return "".join(character for character in text.lower().strip() if character not in marks)

    exact = max(int(bare(answer) == bare(predicted)) for answer in answers)
    return exact, max(f1(segmented(answer), segmented(predicted)) for answer in answers)


def test_chinese_scores_are_those_of_the_official_script():
    draw, pieces = (
        random.Random(0),
        ["北", "京", "大", "学", "，", "。", "……", "《", "NLP", " ", "Bert", "19", "年", "-", "🙂"],
    )
    for _ in range(3000):
        predicted, answers = drawn(draw, pieces), [drawn(draw, pieces) + "学" for _ in range(draw.randint(1, 3))]
        assert cmrc(predicted, answers) == pytest.approx(official_cmrc(predicted, answers)), (predicted, answers)
    assert cmrc("", []) == (1, 1) and cmrc("北", []) == (0, 0)


def test_best_threshold_is_the_best_of_all():
    draw = random.Random(0)
    for _ in range(200):
        margins = {n: draw.uniform(-5, 5) for n in range(9)}
        f1 = {n: draw.random() for n in range(9) if draw.random() < 0.6}
        best, threshold = best_threshold(margins, f1)

        def score(limit, margins=margins, f1=f1):
            return sum(f1.get(n, 0.0) if margin <= limit else float(n not in f1) for n, margin in margins.items()) / 9

        assert best == pytest.approx(max(map(score, [-99.0, *margins.values()])))
        assert score(threshold) == pytest.approx(best) or best == pytest.approx(score(-99.0))


def test_bytes_of_squads_files_are_named_with_their_line(tmp_path: Path):
    file = tmp_path / "a.json"
    file.write_bytes(b'{"data": [\n{"paragraphs": [{"context": "caf\xe9", "qas": [{"id": 1}]}]}]}')
    with pytest.raises(UserError, match="a.json:2: byte 0xe9 .* --data.tables.encoding cp1252"):
        list(read_files(str(file), Tables(), QuestionData.formats))
    (row,) = read_files(str(file), Tables(encoding="cp1252"), QuestionData.formats)
    assert row["context"] == "café"
