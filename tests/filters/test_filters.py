"""Filters of corpora: what they remove, mark and change, whatever the order of the documents."""

import json
import random
from pathlib import Path

import pytest
from conftest import optional

from lm_lightning.data.corpus import Piece
from lm_lightning.data.documents import Documents
from lm_lightning.data.filter import Document
from lm_lightning.data.filtering import filter_corpus, run
from lm_lightning.errors import UserError


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
    begins = [sentences(draw, 30) for _ in range(5)]
    templated += [
        f"{begin} {sentences(draw, 1)}" for begin in begins for _ in range(2)
    ]  # 1 of 31 words: similarity 0.75
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


def judge(own, text):
    """The rule that a text breaks, or what it is changed to; None if it stays."""
    own.check()
    verdict = own.judge(Document(0, "train", text))
    return getattr(verdict, "rule", None) or getattr(verdict, "text", None)


PROSE = "It was the best of times, and it was the worst of times, as all of the people in that town had to say. "


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (PROSE * 3, None),
        (PROSE, "min_words"),
        ("of the a b c d " * 20, "min_mean_word"),
        (PROSE * 3 + "# " * 10, "max_hashes"),
        (PROSE + "... " * 10 + PROSE * 2, "max_ellipses"),
        ("-" + PROSE.replace(" ", "\n-") * 3, "max_bullet_lines"),
        (PROSE.replace(",", "…\n") * 3, "max_ellipsis_lines"),
        (PROSE * 3 + "1234 5678 " * 20, "min_alphabetic"),
        ("Das war die beste aller Zeiten, und es war auch die schlechteste. " * 6, "min_stop_words"),
        ("天地玄黃宇宙洪荒日月盈昃辰宿列張。" * 4, "min_stop_words"),  # Chinese is not refused for its short words
    ],
)
def test_gopher_quality(text: str, rule: str):
    from lm_lightning.filters.quality import GopherQuality

    assert judge(GopherQuality(), text) == rule
    assert rule is None or judge(GopherQuality(**{rule: 0 if rule == "min_stop_words" else None}), text) is None


def test_gopher_repetition():
    from lm_lightning.filters.repetition import GopherRepetition

    text = sentences(random.Random(0), 200)
    parts = [sentences(random.Random(seed), 10) for seed in range(10)]
    assert judge(GopherRepetition(), text) is None
    assert judge(GopherRepetition(), "\n".join(parts + parts[:1] * 5)) == "max_duplicate_lines"
    assert judge(GopherRepetition(), "\n\n".join(parts + parts[:5])) == "max_duplicate_lines"
    assert judge(GopherRepetition(max_duplicate_lines=1, max_duplicate_line_characters=1), "\n\n".join(parts * 2)) == (
        "max_duplicate_paragraphs"
    )
    assert judge(GopherRepetition(), text + " big dog" * 60) == "top 2-gram"
    words = text.split()
    assert judge(GopherRepetition(), " ".join(words + words[:40])) == "duplicate 5-grams"  # 17 %, not 29 %
    assert judge(GopherRepetition(), " ".join(words + words[:30])) == "duplicate 7-grams"  # 13 %, not more than 14
    assert judge(GopherRepetition(max_duplicate_ngrams=None), " ".join(words * 2)) is None


def test_c4_quality():
    from lm_lightning.filters.quality import C4Quality

    good = "This is a sentence of seven words. Here is the next one. “And this is the last one?”"
    assert judge(C4Quality(), good) is None
    assert judge(C4Quality(), f"Menu\n{good}\nPlease enable Javascript to see this page.\nToo short.") == good
    assert judge(C4Quality(), f"{good}\nWe use cookies for the site.") == good
    assert judge(C4Quality(), good.replace("next", "next[12]")) == good
    assert judge(C4Quality(), "Only one sentence is in this text.") == "min_sentences"
    assert judge(C4Quality(), good + " Lorem ipsum dolor.") == "lorem_ipsum"
    assert judge(C4Quality(), good + " int main() {}.") == "braces"
    wrapped = good.replace("seven", "seven\n").replace("last", "last\n")
    assert judge(C4Quality(wrapped=True), wrapped) is None
    assert judge(C4Quality(), wrapped) == "min_sentences"


def test_languages():
    from lm_lightning.filters.language import Language

    german = "Das ist ein deutscher Satz, und er ist lang genug, um ihn sicher zu erkennen."
    assert judge(Language(), PROSE) is None and judge(Language(), german) == "de"
    assert judge(Language(["de", "zh"]), german) is None and judge(Language(["de"]), PROSE) == "en"
    assert judge(Language(["zh"], min_characters=10), "天下之水，莫大於海，萬川歸之，不知何時止而不盈。") is None
    assert judge(Language(), german[:20]) is None
    with pytest.raises(UserError, match="english"):
        Language(["english"]).check()


def test_overlap_with_other_splits_and_benchmarks(tmp_path: Path):
    from lm_lightning.filters.overlap import Contamination, SplitOverlap

    draw = random.Random(0)
    held, common, fine = sentences(draw, 60), sentences(draw, 20), [sentences(draw, 60) for _ in range(30)]
    quoting = [sentences(draw, 30) + " " + held.upper().replace(" ", ", ")[:200] for _ in range(3)]
    boilerplate = [f"{sentences(draw, 30)} {common}" for _ in range(15)]  # is in more than ten documents
    texts = [("test", f"{held} {common}"), *(("train", text) for text in (*fine, *quoting, *boilerplate))]
    left, (report,) = apply(tmp_path / "a", [SplitOverlap()], texts)
    assert {text for _, text in texts} - {text for _, text in left} == set(quoting)
    assert report["removed"]["train"] == 3 and "ignored" in report["notes"][0]
    assert len(apply(tmp_path / "b", [SplitOverlap(common=None)], texts)[0]) == len(texts) - 18
    examples = [held, sentences(draw, 20), " ".join(fine[0].split()[:9]), "too short"]
    benchmark = tmp_path / "questions.jsonl"
    benchmark.write_text("".join(json.dumps({"question": text}) + "\n" for text in examples))
    options = {"paths": [str(benchmark)], "text_column": "question"}
    left, (report,) = apply(tmp_path / "c", [Contamination(action="mark", **options)], texts)
    assert len(left) == len(texts) and report["marked"]["documents"] == 4
    assert report["notes"] == [
        "questions.jsonl: 2 of 4 examples (50.00%) were found; 1 have fewer than 8 words and cannot be found"
    ]
    assert len(apply(tmp_path / "d", [Contamination(**options)], texts)[0]) == len(texts) - 4
    overlaps = [SplitOverlap(), Contamination(**options)]  # each with its own table
    assert len(apply(tmp_path / "e", overlaps, texts)[0]) == len(texts) - 4
    before = Contamination(**options).identity()
    benchmark.write_text(json.dumps({"question": "another"}))
    assert Contamination(**options).identity() != before


def test_the_report_has_filters_with_examples(tmp_path: Path):
    write = optional("reports.page.write")
    from lm_lightning.filters.duplicates import ExactDuplicates

    (tmp_path / "work").mkdir()
    filter_corpus([ExactDuplicates()], pieces(["Some <b>text", "Some <b>text", "Another"]), None, 1, tmp_path / "work")
    info = json.loads((tmp_path / "work" / "info.json").read_text())
    (tmp_path / "config.yaml").write_text("model: {}")
    (tmp_path / "data.json").write_text(json.dumps(info))
    write([tmp_path], tmp_path / "report.html")
    content = (tmp_path / "report.html").read_text()
    assert "1 documents (33.33%), 12 bytes" in content and "Some &lt;b&gt;text" in content


def test_no_training_document_left_is_refused(tmp_path: Path):
    from lm_lightning.filters.quality import GopherQuality

    with pytest.raises(UserError, match="no training document is left of 1 documents after the filters GopherQuality"):
        filter_corpus([GopherQuality()], pieces(["short"]), None, 1, tmp_path)
