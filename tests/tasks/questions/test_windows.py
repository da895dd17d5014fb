"""Data of question answering: answers stay where they are in the text, in windows, from tables of any form."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lm_lightning.data.tokenizer import Tokenizer, load, train
from lm_lightning.errors import UserError
from lm_lightning.finetuning.examples import Examples
from lm_lightning.finetuning.tables import Row, Tables, read_split
from lm_lightning.tasks.questions.data import QuestionColumns, QuestionData

CONTEXT = "🙂 👩‍👩‍👧 e\u0301te\u0301 " + "one two three four five six seven eight nine ten " * 6 + "eleven 🙂 twelve"
QUESTION = "which one is it"
FLAT = [
    {"id": "x", "context": CONTEXT, "question": QUESTION, "answers": [("eleven 🙂 twelve", CONTEXT.index("eleven"))]},
    {"id": "y", "context": CONTEXT, "question": QUESTION, "answers": [("e\u0301te\u0301", CONTEXT.index("e\u0301"))]},
    {"id": "z", "context": CONTEXT, "question": QUESTION, "answers": []},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    options = Tokenizer(algorithm="wordpiece", vocab_size=150, lowercase=True)
    train(options, iter([f"{CONTEXT} {QUESTION}"] * 3), "bert").save_pretrained(folder)
    return folder


def data(tokenizer: Path, **options) -> QuestionData:
    made = QuestionData(max_length=32, overlap=8, max_question=8, **options)
    made.tokenizer, made.seed, made.trainer = load(str(tokenizer)), 0, SimpleNamespace(is_global_zero=True)
    return made


def write(folder: Path, form: str) -> tuple[Path, QuestionColumns]:
    """The same three questions in one of the forms."""
    file = folder / f"rows.{'json' if form == 'squad' else 'csv' if form == 'csv' else 'jsonl'}"
    lists = [[{"text": text, "answer_start": start} for text, start in row["answers"]] for row in FLAT]
    columns = [{"text": [t for t, _ in row["answers"]], "answer_start": [s for _, s in row["answers"]]} for row in FLAT]
    if form == "squad":
        qas = [{"id": row["id"], "question": row["question"], "answers": a} for row, a in zip(FLAT, lists)]
        file.write_text(json.dumps({"data": [{"paragraphs": [{"context": CONTEXT, "qas": qas}]}]}))
        return file, QuestionColumns()
    if form == "csv":
        with open(file, "w", newline="", encoding="utf-8") as stream:
            table = csv.writer(stream)
            table.writerow(["passage", "question", "right", "at"])
            for row in FLAT:
                table.writerow([CONTEXT, row["question"], *(row["answers"] or [("", "")])[0]])
        return file, QuestionColumns(context="passage", answer="right", answer_start="at")
    rows = [row | {"answers": a} for row, a in zip(FLAT, columns if form == "hub" else lists)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file, QuestionColumns()


@pytest.mark.parametrize("form", ["squad", "csv", "jsonl", "hub"])
def test_answers_are_found_in_every_form(tokenizer: Path, tmp_path: Path, form: str):
    file, columns = write(tmp_path, form)
    own = data(tokenizer, columns=columns, tables=Tables(test=[str(file)]))
    examples = own.encode("test", list(read_split(own.tables, "test", own.key, own.formats)))
    assert [q.id for q in own.questions["test"]] == ([0, 1, 2] if form == "csv" else ["x", "y", "z"])
    found: dict[int, set[str]] = {0: set(), 1: set(), 2: set()}
    ends: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for row, window in zip(examples, own.windows["test"], strict=True):
        first, last = row["targets"].tolist()
        assert len(row["input_ids"]) == len(row["context"]) <= 32
        inside = row["context"].nonzero().flatten().tolist()
        ends[window.question].append(window.offsets[inside[-1], 1])
        if first:
            assert row["context"][first : last + 1].all()
            found[window.question].add(CONTEXT[window.offsets[first, 0] : window.offsets[last, 1]])
    # (the last mark is not of a token, as the tokenizer takes accents off; predictions have it)
    assert found == {0: {"eleven 🙂 twelve"}, 1: {"e\u0301te"}, 2: set()}
    assert all(len(last) > 2 and last[-1] == len(CONTEXT) for last in ends.values())


def test_an_answer_longer_than_the_overlap_is_told_and_not_learned(tokenizer: Path, tmp_path: Path, capsys):
    long = CONTEXT[CONTEXT.index("one") : CONTEXT.rindex("ten")].strip()
    own = data(tokenizer)
    values = FLAT[0] | {"answers": [{"text": long, "answer_start": CONTEXT.index(long)}], "question": "which " * 30}
    examples = own.encode("train", [Row(values, "a:1")])
    assert all(torch.equal(row["targets"], torch.tensor([-100, -100])) for row in examples)
    own.report("train", Examples(examples, 0), own.counts)
    out = capsys.readouterr().out
    assert "train: 1 questions, 0 without an answer" in out and "1 questions are truncated to 8 tokens" in out
    assert "1 are not used, as their answer is in no window" in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": [{"text": "eleven", "answer_start": 3}]}, "a:7: the answer 'eleven' is not at .* it is at "),
        ({"answers": [{"text": "absent", "answer_start": 3}]}, "it is not in the context"),
        ({"answers": [{"text": "eleven", "answer_start": None}]}, "not at its answer_start None"),
        ({"answers": "eleven"}, "column 'answers' is 'eleven', but must be a list of"),
        ({"answers": {"text": ["eleven"], "answer_start": []}}, "must be a list of"),
        ({"answers": None}, "is None, but must be a list of"),
        ({"context": " "}, "column 'context' is .* must be text"),
    ],
)
def test_rows_that_are_wrong_are_named(tokenizer: Path, change: dict, message: str):
    with pytest.raises(UserError, match=message):
        data(tokenizer).encode("test", [Row(FLAT[2] | change, "a:7")])


def test_files_that_are_not_squads_are_refused(tmp_path: Path):
    for text, message in (
        ("[]", "not in the format of SQuAD's"),
        ('{"data": [{}]}', "not in the format of SQuAD's"),
        ('{"a": 1}\n{}', "not valid JSON"),
    ):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UserError, match=message):
            list(read_split(Tables(test=[str(tmp_path / "a.json")]), "test", lambda row: "", QuestionData.formats))


def test_windows_must_go_on(tokenizer: Path):
    own = data(tokenizer)
    own.overlap = 21  # 32 tokens less 8 of the question and 3 special ones
    with pytest.raises(UserError, match="data.overlap is 21, but must be from 0 to 20"):
        own.encode("test", [Row(FLAT[2], "a:1")])
    own.tokenizer_options, own.max_question = Tokenizer(str(tokenizer)), 0
    with pytest.raises(UserError, match="data.max_question is 0, but must be 1 or more"):
        own.check()


def test_bytes_of_another_encoding_are_named_and_read_on_request(tmp_path: Path):
    file = tmp_path / "a.json"
    file.write_bytes(b'{"data": [\n{"paragraphs": [{"context": "caf\xe9", "qas": [{"id": 1}]}]}]}')

    def rows(**options: str) -> list[Row]:
        return list(read_split(Tables(test=[str(file)], **options), "test", lambda row: "", QuestionData.formats))

    with pytest.raises(UserError, match="a.json:2: byte 0xe9 .* --data.tables.encoding cp1252"):
        rows()
    assert rows(encoding="cp1252")[0]["context"] == "café"
