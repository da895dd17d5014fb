"""Filters of corpora: what they remove, mark and change, whatever the order of the documents."""

import json
import random
from pathlib import Path

from lm_lightning.data.corpus import Piece
from lm_lightning.data.documents import Documents
from lm_lightning.data.filtering import run


def pieces(texts, split="train"):
    """Documents as pieces; a text may be a pair of split and text."""
    pairs = [(split, text) if isinstance(text, str) else text for text in texts]
    return [Piece(name, f"{number}", text, True) for number, (name, text) in enumerate(pairs)]


def apply(folder, filters, texts, processes=1):
    """The documents that remain as (split, text), and what the filters have done."""
    folder.mkdir(parents=True)
    for own in filters:
        own.check()
    documents = Documents(folder, pieces(texts), None, processes)
    with open(folder / "filtered.jsonl", "w") as listing:
        report = run(filters, documents, listing)
    left = [number for number in range(len(documents)) if documents.remaining[number]]
    splits = ("train", "validation", "test")
    return [(splits[documents.splits[number]], documents.text(number)) for number in left], report


def test_exact_duplicates_whatever_the_order(tmp_path: Path):
    from lm_lightning.filters.duplicates import ExactDuplicates

    texts = [
        ("train", "One  text."),
        ("validation", "One text."),
        ("train", "Two."),
        ("train", "Two.\n"),
        ("train", "two"),
    ]
    results = []
    for attempt in range(4):
        random.Random(attempt).shuffle(texts)
        left, report = apply(tmp_path / str(attempt), [ExactDuplicates()], texts)
        results.append(sorted(left))
        assert report[0]["removed"]["documents"] == 2
    assert results == [[("train", "Two.\n"), ("train", "two"), ("validation", "One text.")]] * 4
    left, _ = apply(tmp_path / "words", [ExactDuplicates("words", splits=["train"])], texts)
    assert sorted(left) == [("train", "Two.\n"), ("validation", "One text.")]


def test_personal_data_is_masked_and_counted(tmp_path: Path):
    from lm_lightning.filters.personal import MaskPersonalData

    kept = "In 1984, 2001 and 1,234,567.89: ISBN 978-0-306-40615-7, pages 100-200-300, a@b, 3.14159265."
    text = "Mail to jane.doe+x@mail.example.org or call +44 20 7946 0958, (020) 7946-0958 or 555-867-5309."
    left, (report,) = apply(tmp_path / "a", [MaskPersonalData()], [kept, text])
    assert left == [("train", kept), ("train", "Mail to [email] or call [phone], [phone] or [phone].")]
    assert report["changed"] == {"documents": 1, "e-mail addresses": 1, "phone numbers": 3}
    assert "jane" not in json.dumps(report)


def sentences(draw, words):
    """A text of made-up words."""
    return " ".join("".join(draw.choices("abcdefghijklmnoprstuvw", k=draw.randint(3, 9))) for _ in range(words))


def changed(draw, text, share):
    """A text with a share of its words replaced."""
    words = text.split()
    for position in draw.sample(range(len(words)), round(share * len(words))):
        words[position] = sentences(draw, 1)
    return " ".join(words)


def test_near_duplicates_are_found_and_others_kept(tmp_path: Path):
    from lm_lightning.filters.near_duplicates import NearDuplicates

    draw = random.Random(0)
    originals = [sentences(draw, 100) for _ in range(40)]
    copies = [changed(draw, text, 0.01) + " and more" for text in originals]
    short = [f"Chapter {number}. The storm of day {number}" for number in range(30)]
    template = "On day {} the weather in {} was {} with {} degrees, and wind of {} knots from {} until noon."
    templated = [template.format(*(sentences(draw, 1) for _ in range(6))) for _ in range(30)]
    different = [changed(draw, text, 0.3) for text in originals]
    texts = [("train", text) for text in (*originals, *short, *templated, *different)]
    texts += [("validation" if number < 10 else "train", text) for number, text in enumerate(copies)]
    expected = {("validation" if number < 10 else "train", text) for number, text in enumerate(copies)}  # (the longer)
    expected |= {("train", text) for text in (*short, *templated, *different)}
    for attempt in range(2):
        draw.shuffle(texts)
        left, (report,) = apply(tmp_path / str(attempt), [NearDuplicates()], texts)
        assert set(left) == expected
        assert report["removed"]["documents"] == 40
    lines = [json.loads(line) for line in (tmp_path / "1" / "filtered.jsonl").read_text().splitlines()]
    assert all(float(line["reason"].split()[1]) >= 0.8 and line["kept"] for line in lines)


def test_texts_that_differ_in_numbers_can_be_kept(tmp_path: Path):
    from lm_lightning.filters.near_duplicates import NearDuplicates

    text = sentences(random.Random(0), 100)
    left, _ = apply(tmp_path / "a", [NearDuplicates(same_numbers=True)], [text + " on day 3", text + " on day 4", text])
    assert len(left) == 3
    assert len(apply(tmp_path / "b", [NearDuplicates()], [text + " on day 3", text + " on day 4", text])[0]) == 1
