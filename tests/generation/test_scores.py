"""Scores of generated texts are those of the usual packages, and do not depend on batches or processes."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lm_lightning import errors
from lm_lightning.errors import UserError
from lm_lightning.generation.evaluation import Task, TextEvaluation
from lm_lightning.generation.scores import Bleu, Chrf, ExactMatch, Rouge, TextScore

TEXTS = ["The cat sat on the mat.", "there is a dog", "", "He plays the guitar in a band ."]
REFERENCES = [["The cat is on the mat.", "A cat sat on a mat."], ["There is a dog."], ["Nothing"], ["He plays guitar."]]
DATA = Path("/work/shared/data")


def test_bleu_and_chrf_are_those_of_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    first, second = [row[0] for row in REFERENCES], [row[1] if row[1:] else None for row in REFERENCES]
    bleu, chrf = Bleu(), Chrf(word_order=2)
    assert bleu.compute(TEXTS, REFERENCES) == {"bleu": sacrebleu.corpus_bleu(TEXTS, [first, second]).score}
    expected = sacrebleu.corpus_chrf(TEXTS, [first, second], word_order=2).score
    assert chrf.compute(TEXTS, REFERENCES) == {"chrf": expected} and expected > 10
    assert bleu.signature().startswith("BLEU|nrefs:") and "tok:13a" in bleu.signature()
    assert "nw:2" in chrf.signature()
    assert Bleu(tokenize="zh").compute(["我很爱你们。"], [["我很爱你们！"]])["bleu"] > 50


def test_rouge_is_that_of_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer")
    values = Rouge().compute(TEXTS, REFERENCES)
    own = scorer.RougeScorer(list(values), use_stemmer=True)
    for name, value in values.items():
        best = [max(own.score(one, text)[name].fmeasure for one in row) for text, row in zip(TEXTS, REFERENCES)]
        assert value == pytest.approx(sum(best) / 4, abs=1e-12)
    assert values["rouge1"] > values["rouge2"] > 0


def test_exact_match_ignores_outer_space_alone():
    assert ExactMatch().compute([" a b", "B", "c"], [["a b"], ["b"], ["x", "c "]]) == {"exact_match": 2 / 3}


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(errors.importlib, "import_module", missing)
    with pytest.raises(UserError, match=r'Bleu needs the package sacrebleu: pip install -e "\.\[scores\]"'):
        Bleu().check()
    with pytest.raises(UserError, match="Rouge needs the package rouge_score"):
        Rouge().check()


def test_wrong_options_are_refused():
    pytest.importorskip("sacrebleu")
    with pytest.raises(UserError, match="'klingon' of Bleu"):
        Bleu(tokenize="klingon").check()
    with pytest.raises(UserError, match="scores has bleu twice"):
        TextEvaluation([Bleu(), Bleu(lowercase=True)]).check()
    with pytest.raises(UserError, match="rows is 0"):
        TextEvaluation([], rows=0).check()


class Length(TextScore):
    """A user's own score."""

    def modes(self) -> dict:
        return {"length": "min"}

    def compute(self, texts, references) -> dict[str, float]:
        return {"length": sum(map(len, texts)) / len(texts)}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_row_is_scored_once_in_the_same_batches_for_any_number_of_processes(size: int, monkeypatch):
    """As in `size` processes, one after the other; what each would get of the others is what these return."""
    texts = [f"text {'long ' * (i % 5)}{i}" for i in range(23)]
    generated: list[list[list[int]]] = [[] for _ in range(size)]
    parts: list[dict] = [{} for _ in range(size)]

    def run(rank: int) -> dict[str, torch.Tensor]:
        def generate(rows: list[int]) -> list[str]:
            generated[rank].append(rows)
            return [texts[row] for row in rows]

        def gather(found: list, own: dict) -> None:
            parts[rank] = own
            found[:] = parts

        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
        strategy = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": size, "rank": rank})
        trainer = SimpleNamespace(sanity_checking=False, fast_dev_run=False, state=SimpleNamespace(fn="validate"))
        trainer.strategy, trainer.world_size, trainer.is_global_zero = strategy, size, False
        task = Task(texts, [[text] for text in texts], [len(text) for text in texts], generate)
        evaluation = TextEvaluation([ExactMatch(), Length()], batch_size=4)
        try:
            return evaluation.run(SimpleNamespace(trainer=trainer, device="cpu"), task)
        except KeyError:  # other processes have not run yet
            return {}

    for rank in range(size):
        run(rank)
    generated = [[] for _ in range(size)]
    values = [run(rank) for rank in range(size)]
    assert all(value == values[0] for value in values) and values[0]["exact_match"] == 1
    assert values[0]["length"].item() == pytest.approx(sum(map(len, texts)) / 23)
    batches = [rows for own in generated for rows in own]
    assert [len(own) for own in generated] == [-(-6 // size)] * size
    unique = sorted({tuple(rows) for rows in batches})
    assert sorted(row for rows in unique for row in rows) == list(range(23))
    lengths = [len(text) for text in texts]
    longest_first = sorted(range(23), key=lambda row: -lengths[row])
    assert unique == sorted(tuple(longest_first[start : start + 4]) for start in range(0, 23, 4))


@pytest.mark.skipif(not (DATA / "scitldr").is_dir(), reason="needs the corpora of this project")
@pytest.mark.slow
def test_baselines_of_real_corpora():
    """The first sentence of an abstract as its summary, and a German text as its own translation."""
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")
    rows = [json.loads(line) for line in (DATA / "scitldr" / "test.jsonl").read_text().splitlines()]
    values = Rouge().compute([row["source"][0] for row in rows], [row["target"] for row in rows])
    assert 0.2 < values["rougeL"] < values["rouge1"] < 0.5
    sides = []
    for side in ("de", "en"):
        with gzip.open(DATA / "multi30k" / f"test_2016_flickr.{side}.gz", "rt", encoding="utf-8") as file:
            sides.append(file.read().splitlines())
    assert Bleu().compute(sides[0], [[text] for text in sides[1]])["bleu"] < 5
    assert Bleu().compute(sides[1], [[text] for text in sides[1]])["bleu"] == pytest.approx(100)
