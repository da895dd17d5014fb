"""Sentence embeddings: padding and chunks change nothing, right answers are no negatives, scores are right."""

import csv
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, command, evaluation
from forks import python
from scipy.stats import pearsonr, spearmanr

from lm_lightning.data.reading import ReadReport
from lm_lightning.data.tokenizer import Tokenizer, load, train
from lm_lightning.errors import UserError
from lm_lightning.finetuning.tables import Row, Tables
from lm_lightning.tasks.embedding.data import PairColumns, PairData, collate_pairs
from lm_lightning.tasks.embedding.model import Embeddings, SentenceEncoder, ranking, select_candidates
from lm_lightning.tasks.embedding.modules import embed, pool, pooling_of
from lm_lightning.tasks.embedding.retrieval import Judgments, Retrieval, answers, judge, scores_of, split

TOPICS = [f"{a}{b}" for a in ("ship", "tree", "song", "lamp") for b in ("wright", "house", "less", "light", "worm")]


def rows(number: int, seed: int) -> list[dict]:
    """Texts about one of twenty topics each, with another text about it, one about another, and a score."""
    draw, result = random.Random(seed), []

    def text(topic: str) -> str:
        words = [*draw.choices(["the", "old", "is", "was", "of", "two", "rivers"], k=draw.randint(1, 9)), topic]
        return " ".join(draw.sample(words, len(words)))

    for _ in range(number):
        topic, other = draw.sample(TOPICS, 2)
        score = draw.choice([0, 5])
        row = {"text": text(topic), "pair": text(topic), "wrong": [text(other), text(other)]}
        result.append(
            row | {"other": text(topic if score else other), "score": score + draw.random() * (-1) ** (score > 0)}
        )
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
    """A tiny BERT without dropout that learns which topic a text is about."""
    files = {
        split: [str(write(tmp_path / f"{split}.jsonl", rows(n, i)))]
        for i, (split, n) in enumerate({"train": 200, "validation": 30, "test": 25}.items())
    }
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    content = {
        "model": {
            "class_path": "SentenceEncoder",
            "init_args": {
                "network": {"model_type": "bert", "max_position_embeddings": 64, **sizes, **off},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-3}},
                "schedule": {"warmup_steps": 2, "shape": "constant"},
            },
        },
        "data": {
            "class_path": "PairData",
            "init_args": {"tables": files, "tokenizer": {"path": str(tokenizer)}, "max_length": 32, "batch_size": 16},
        },
        "best": {"monitor": "val/loss"},
        "trainer": {
            **{"max_steps": 6, "val_check_interval": 6, "check_val_every_n_epoch": None, "log_every_n_steps": 1},
            **{"accelerator": "cpu", "precision": "32-true"},
        },
        "runs_dir": str(tmp_path / "runs"),
    }
    file = tmp_path / "pairs.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def logged(run: Path, name: str) -> list[float]:
    with open(run / "metrics.csv", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def value(out: str, name: str) -> float:
    return float(next(line for line in out.splitlines() if f"test/{name} " in line).split("│")[2])


SCORES = ("--data.columns", '{"text": "text", "pair": "other", "score": "score"}')
NEGATIVES = ("--data.columns.negatives", "wrong", "--data.hard_negatives", 2)


def embeddings(model: Path, texts: list[str]) -> torch.Tensor:
    """What plain transformers gives, each text alone: the mean of the last states, of length 1."""
    from transformers import AutoModel, AutoTokenizer

    network, tokenizer = AutoModel.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    with torch.no_grad():
        states = [network(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in texts]
    return torch.nn.functional.normalize(torch.stack(states), dim=-1)


# Embeddings


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_does_not_count(pooling):
    states, mask = torch.randn(1, 5, 8), torch.tensor([[1, 1, 1, 0, 0]])
    expected = states[0, :3].mean(0) if pooling == "mean" else states[0, 0]
    assert torch.allclose(pool(states, mask, pooling)[0], expected / expected.norm(), atol=1e-6)


# The loss


def test_right_answers_are_no_negatives():
    """Rows 0 and 1 ask the same; 2 and 3 have the same pair; the pair of 4 is the text of 5; 6 fills up the batch."""
    texts = torch.tensor([10, 10, 12, 13, 14, 15, 16])
    keys = torch.tensor([20, 21, 22, 22, 15, 25, 26, 20, 31, 31, 15, 35, 36, 99])  # pairs, then hard negatives
    owners = torch.cat([texts, torch.zeros(7, dtype=torch.long)])
    offered = torch.tensor([True] * 6 + [False]).repeat(2)
    allowed = select_candidates(texts, torch.arange(7), keys, owners, offered)
    assert allowed.diagonal().all()
    scored = [{i for i, on in enumerate(row) if on} for row in allowed.tolist()]
    hard = {8, 11}  # the first of equal ones; 12 and 13 are of the row that fills up, or equal to others
    assert scored[0] == {0, 2, 4, 5} | hard | {12} and scored[1] == {1, 2, 4, 5} | hard | {12}
    assert scored[2] == {0, 1, 2, 4, 5} | hard | {12} and scored[3] == {0, 1, 3, 4, 5} | hard | {12}
    assert 4 not in scored[5] and 10 not in scored[5]


def losses_by_hand(run: Path, content: list[dict]) -> float:
    """The mean contrastive loss of one batch, text by text."""
    pairs = [row["pair"] for row in content]
    first, second = (embeddings(run / "model", texts) for texts in ([row["text"] for row in content], pairs))
    cosines, total = 20 * (first @ second.T).numpy(), 0.0
    for i, row in enumerate(content):
        wrong = [j for j, other in enumerate(content) if other["text"] != row["text"] and other["pair"] != row["pair"]]
        wrong = [j for j in wrong if pairs[j] != row["text"] and pairs.index(pairs[j]) == j]
        total += np.log(np.exp(cosines[i, [i, *wrong]]).sum()) - cosines[i, i]
    return total / len(content)


def test_loss_is_that_of_the_definition(fit, cli, recipe: Path):
    """25 rows, of which three have a text or a pair of others, in a batch of 32."""
    content = rows(25, 2)
    content[3]["pair"], content[4]["text"], content[5]["pair"] = (
        content[2]["pair"],
        content[1]["text"],
        content[6]["text"],
    )
    write(recipe.parent / "test.jsonl", content)
    run = fit()
    flags = ("--config", recipe, "--ckpt_path", run / "checkpoints" / "best.ckpt", "--data.batch_size", 25)
    assert value(cli("test", *flags), "loss") == pytest.approx(losses_by_hand(run, content), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), NEGATIVES, SCORES], ids=["pairs", "negatives", "scores"])
def test_gradient_caching_gives_the_same_steps(fit, flags: tuple):
    states = []
    for chunk in ("null", 5):
        run = fit(
            "--name", f"chunk-{chunk}", "--model.mini_batch_size", chunk, *flags, "--trainer.limit_val_batches", 0
        )
        states.append((logged(run, "train/gradient_norm"), logged(run, "train/loss")))
    assert len(states[0][0]) == 6 and states[0][0] == pytest.approx(states[1][0], rel=1e-4)
    assert states[0][1] == pytest.approx(states[1][1], rel=1e-4)


def test_gradient_caching_keeps_one_chunk_and_its_dropout(tokenizer: Path):
    """The chunks' activations are freed, and the second computation draws the same dropout as the first."""
    from transformers import BertConfig, BertModel

    module = SentenceEncoder(network={"model_type": "bert"}, mini_batch_size=2)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    module.network = BertModel(BertConfig(vocab_size=200, hidden_dropout_prob=0.5, **sizes)).train()
    ids, mask = torch.randint(5, 200, (8, 12)), torch.ones(8, 12, dtype=torch.long)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        torch.manual_seed(0)
        vectors = module.embed(ids, mask)
    assert sum(kept) < 8 * 12 * 32  # less than one layer's
    vectors[:, 0].sum().backward()
    cached = {name: p.grad.clone() for name, p in module.network.named_parameters() if p.grad is not None}
    module.zero_grad()
    torch.manual_seed(0)
    torch.cat([module.pooled(i, m) for i, m in zip(ids.split(2), mask.split(2))])[:, 0].sum().backward()
    for name, parameter in module.network.named_parameters():
        assert parameter.grad is None or torch.allclose(cached[name], parameter.grad, atol=1e-6), name


def test_micro_batches_of_scores_make_the_same_steps(fit):
    whole = fit("--name", "whole", *SCORES)
    part = fit("--name", "part", *SCORES, "--data.batch_size", 4, "--trainer.accumulate_grad_batches", 4)
    assert logged(whole, "train/gradient_norm") == pytest.approx(logged(part, "train/gradient_norm"), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [
        "ddp",
        "fsdp2",  # fork: sharding
    ],
)
def test_two_processes_that_gather_do_what_one_does(fit, recipe: Path, strategy: str):
    """A batch of 16 by one process, or of 8 by each of two, with chunks: equal gradients, losses and scores."""
    flags = (*NEGATIVES, "--model.mini_batch_size", 4, "--model.gather_across_devices", "true")
    one = fit("--name", "one", *flags)
    two_flags = ("--trainer.strategy", strategy, "--trainer.devices", 2, "--data.batch_size", 8, "--name", "two")
    result = command("fit", "--config", recipe, *flags, *two_flags)
    assert result.returncode == 0, result.stderr
    (two,) = (recipe.parent / "runs" / "two").iterdir()
    for name in ("train/gradient_norm", "train/loss", "val/ndcg_10", "val/mrr_10", "val/recall_100"):
        assert logged(one, name) == pytest.approx(logged(two, name), rel=1e-3), name


# Metrics


@pytest.mark.slow
def test_training_brings_pairs_together(fit, cli, recipe: Path):
    run = fit("--trainer.max_steps", 80, "--trainer.val_check_interval", 80, *NEGATIVES)
    assert logged(run, "train/loss")[-1] < 0.7 * logged(run, "train/loss")[0]
    before, after = (fit("--name", f"{n}", "--trainer.max_steps", n, *SCORES) for n in (6, 120))
    assert logged(after, "val/spearman")[-1] > max(0.6, logged(before, "val/spearman")[-1])


@pytest.mark.slow
def test_correlations_are_those_of_scipy(fit, cli, recipe: Path):
    run, content = fit(*SCORES), rows(25, 2)
    out = cli("test", "--config", recipe, *SCORES, "--ckpt_path", run / "checkpoints" / "best.ckpt")
    first, second = (embeddings(run / "model", [row[name] for row in content]) for name in ("text", "other"))
    cosines, scores = (first * second).sum(-1).numpy(), [row["score"] for row in content]
    assert value(out, "spearman") == pytest.approx(spearmanr(cosines, scores).statistic, abs=1e-4)
    assert value(out, "pearson") == pytest.approx(pearsonr(cosines, scores).statistic, abs=1e-4)
    assert value(out, "loss") == pytest.approx(np.mean((cosines - np.array(scores) / 5) ** 2), abs=1e-4)


def scores_by_hand(cosines: np.ndarray, gains: np.ndarray) -> dict[str, float]:
    """nDCG@10, MRR@10 and recall@100, from cosines and gains of every query and document."""
    from sklearn.metrics import ndcg_score

    ranks = np.argsort(-cosines, axis=1)
    sorted_gains = np.take_along_axis(gains, ranks, 1)
    first = [np.flatnonzero(row[:10]) for row in sorted_gains]
    return {
        "ndcg_10": ndcg_score(gains, cosines, k=10),
        "mrr_10": float(np.mean([1 / (hits[0] + 1) if len(hits) else 0 for hits in first])),
        "recall_100": float(np.mean((sorted_gains[:, :100] > 0).sum(1) / (gains > 0).sum(1))),
    }


def test_ranking_is_that_of_scikit_learn():
    draw = np.random.default_rng(0)
    vectors = torch.nn.functional.normalize(torch.randn(340, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    gains = (draw.random((40, 300)) < 0.02) * draw.integers(1, 4, (40, 300))
    gains[:, 7] = 1  # each has an answer
    relevant = [{int(j): float(row[j]) for j in np.flatnonzero(row)} for row in gains]
    seen = Embeddings(torch.arange(340), vectors, vectors)
    scored = ranking(seen, Judgments(list(range(300, 340)), list(range(300)), relevant))
    expected = scores_by_hand((vectors[300:] @ vectors[:300].T).numpy(), gains)
    assert {name: float(number) for name, number in scored.items()} == pytest.approx(expected, abs=1e-5)


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    """Forty documents, of which one is empty, one that is a query, and nine queries, of which one has no answer.

    One answer is to an unknown query and one is an unknown document.
    """
    content = rows(49, 5)
    documents = [{"_id": f"d{i}", "title": row["text"], "text": row["pair"]} for i, row in enumerate(content[:40])]
    documents[3] |= {"title": "", "text": ""}
    write(tmp_path / "corpus.jsonl", [*documents, {"_id": "3", "text": content[43]["text"]}])
    write(tmp_path / "queries.jsonl", [{"_id": i, "text": row["text"]} for i, row in enumerate(content[40:])])
    lines = [f"{i}\td{(7 * i + j) % 40}\t{j}" for i in range(8) for j in range(4)]
    lines += ["99\td1\t1", "1\tmissing\t2"]
    (tmp_path / "qrels.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")
    return tmp_path


def beir_by_hand(found: dict[str, dict[str, float]], judged: dict[str, dict[str, float]], ignore: bool) -> dict:
    """What BEIR's evaluation tells, by its definition: `found` has the cosine of each document to each query."""
    sums = {"ndcg_10": 0.0, "mrr_10": 0.0, "recall_100": 0.0}
    queries = [query for query in found if any(score > 0 for score in judged.get(query, {}).values())]
    for query in queries:
        right = {document: score for document, score in judged[query].items() if score > 0}
        ranks = sorted(found[query], key=lambda document: -found[query][document])
        if ignore:
            ranks = [document for document in ranks if document != query]
        gains = [right.get(document, 0) for document in ranks]
        ideal = sorted(right.values(), reverse=True)
        gain, best = (sum(g / np.log2(i + 2) for i, g in enumerate(of[:10])) for of in (gains, ideal))
        sums["ndcg_10"] += gain / best
        sums["mrr_10"] += next((1 / (i + 1) for i, g in enumerate(gains[:10]) if g), 0)
        sums["recall_100"] += sum(g > 0 for g in gains[:100]) / len(right)
    return {name: total / len(queries) for name, total in sums.items()}


def judgements(file: Path) -> dict[str, dict[str, float]]:
    judged: dict[str, dict[str, float]] = {}
    for line in file.read_text().splitlines()[1:]:
        query, document, score = line.split("\t")
        judged.setdefault(query, {})[document] = float(score)
    return judged


@pytest.mark.slow
def test_search_with_known_answers(fit, cli, recipe: Path, beir: Path):
    run = fit("--data.retrieval.validation", beir / "qrels.tsv", *files(beir), "--best.monitor", "val/ndcg_10")
    test = ("--data.retrieval.test", beir / "qrels.tsv", *files(beir))
    out = cli("test", "--config", recipe, *test, "--ckpt_path", run / "checkpoints" / "best.ckpt")
    assert (
        "8 queries to 41 documents, 1 queries without a correct answer are omitted, 1 answers to unknown queries" in out
    )
    assert (
        "qrels.tsv:34), 1 correct answers are not in the corpus, so cannot be found (first: missing), 1 documents"
        in out
    )
    assert "1 rows have no text" in out
    texts = ((beir / f"{name}.jsonl").read_text().splitlines() for name in ("corpus", "queries"))
    corpus, queries = ([json.loads(line) for line in lines] for lines in texts)
    documents = embeddings(run / "model", [f"{row.get('title', '')} {row['text']}".strip() for row in corpus])
    asked = embeddings(run / "model", [row["text"] for row in queries])
    cosines = {
        str(query["_id"]): {row["_id"]: float(cosine) for row, cosine in zip(corpus, cosines)}
        for query, cosines in zip(queries, asked @ documents.T)
    }
    expected, other = (beir_by_hand(cosines, judgements(beir / "qrels.tsv"), ignore) for ignore in (True, False))
    assert {name: value(out, name) for name in expected} == pytest.approx(expected, abs=1e-4)
    assert logged(run, "val/ndcg_10")[-1] == pytest.approx(expected["ndcg_10"], abs=1e-4)
    out = cli(
        *("test", "--config", recipe, *test, "--ckpt_path", run / "checkpoints" / "best.ckpt"),
        *("--data.retrieval.ignore_identical_ids", "false"),
    )
    assert {name: value(out, name) for name in other} == pytest.approx(other, abs=1e-4)
    assert other["mrr_10"] != pytest.approx(expected["mrr_10"], abs=1e-3)


def judged_and_rows(queries: Path, corpus: Path, qrels: Path, **options) -> tuple[Judgments, list]:
    """What the data module reads of the files, without a run."""
    data = PairData(retrieval=Retrieval(str(queries), str(corpus), str(qrels), **options))
    found = list(data.read("validation", ReadReport()))
    notes = [{"id": row["_id"], "query": "query" in row} for row in found]
    return judge(
        str(qrels), scores_of(str(qrels), "validation", Tables()), notes, data.retrieval.ignore_identical_ids
    ), found


@pytest.mark.slow
def test_loaders_start_fresh_processes(fit, cli, recipe: Path, beir: Path):
    """As on macOS and Windows, where everything that a loader needs is pickled."""
    search = ("--data.retrieval.validation", beir / "qrels.tsv", *files(beir), "--best.monitor", "val/ndcg_10")
    flags = (*search, "--trainer.num_sanity_val_steps", 0)
    runs = [fit("--name", "none", *flags)]
    method = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        runs.append(fit("--name", "fresh", *flags, "--data.num_workers", 1))
    finally:
        multiprocessing.set_start_method(method, force=True)
    for name in ("train/loss", "val/ndcg_10"):
        assert logged(runs[0], name) == pytest.approx(logged(runs[1], name)) and logged(runs[0], name)


@pytest.mark.parametrize("ignore", [True, False])
def test_cranfield_is_scored_as_by_beir(ignore: bool):
    """Bags of words as embeddings; Cranfield numbers queries and documents independently."""
    folder = ROOT.parent / "shared" / "data" / "cranfield"
    if not folder.is_dir():
        pytest.skip("needs Cranfield")
    paths = [folder / name for name in ("queries.jsonl", "corpus.jsonl", "qrels.tsv")]
    judged, found = judged_and_rows(*paths, ignore_identical_ids=ignore)
    vectors = np.zeros((len(found), 4096), np.float32)
    for i, row in enumerate(found):
        for word in row["text"].lower().split():
            vectors[i, zlib.crc32(word.encode()) % 4096] += len(word)
    vectors += 1e-3 * np.random.default_rng(0).random(vectors.shape, np.float32)  # no ties
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    scored = ranking(Embeddings(torch.arange(len(found)), *[torch.from_numpy(vectors)] * 2), judged)
    cosines = vectors[judged.queries] @ vectors[:1400].T
    results = {
        found[row]["_id"]: {document["_id"]: float(c) for document, c in zip(found[:1400], cosines_of_row)}
        for row, cosines_of_row in zip(judged.queries, cosines)
    }
    expected = beir_by_hand(results, judgements(paths[2]), ignore)
    assert {name: float(number) for name, number in scored.items()} == pytest.approx(expected, abs=1e-4)
    assert 0.1 < expected["ndcg_10"] < 0.6


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        (
            "corpus.jsonl",
            '{"_id": "d5", "text": "again"}',
            r"corpus.jsonl:42: .*corpus.jsonl:6 has the same _id, 'd5'",
        ),
        ("queries.jsonl", '{"_id": 2, "text": "again"}', r"queries.jsonl:10: .*queries.jsonl:3 has the same _id, 2"),
        ("qrels.tsv", "2\td15\t3", r"qrels.tsv:36: query 2 and document d15 already have a score at .*qrels.tsv:11"),
        ("qrels.tsv", "2\td35\tnan", "qrels.tsv:36: data.retrieval.validation needs the columns"),
    ],
)
def test_ids_that_are_there_twice_are_refused(beir: Path, name: str, line: str, message: str):
    with open(beir / name, "a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=message):
        judged_and_rows(*(beir / name for name in ("queries.jsonl", "corpus.jsonl", "qrels.tsv")))


def test_a_document_that_is_the_query_itself_is_no_answer():
    """As in duplicate questions, where each text is also the pair of another."""
    texts = {"a": [2, 9, 3], "b": [2, 8, 3], "c": [2, 7, 3]}
    pairs = [("a", "b"), ("b", "c"), ("c", "c")]
    examples = [{"input_ids": texts[x] + texts[y], "lengths": [3, 3]} for x, y in pairs]
    judged = answers(examples)
    assert judged.relevant == [{0: 1.0}, {1: 1.0}, {1: 1.0}]
    assert judged.excluded == [None, 0, None]  # b is a document, and c its own answer


def files(folder: Path) -> tuple:
    return ("--data.retrieval.queries", folder / "queries.jsonl", "--data.retrieval.corpus", folder / "corpus.jsonl")


# Exports and messages


def test_export_is_read_by_sentence_transformers(fit, cli, recipe: Path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    texts = [row["text"] for row in rows(10, 7)]
    for pooling in ("cls", "mean"):
        run = fit("--name", pooling, "--model.pooling", pooling, "--data.max_length", 8)
        again = run.parent / "again"
        cli("export", run, "--output", again)
        own = embed(*loaded(run / "model"), texts, pooling, 8)
        for folder in (run / "model", again):
            other = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
            assert other.max_seq_length == 8
            assert np.allclose(other.encode(texts), own.numpy(), atol=1e-5)


# What sentence-transformers does with the files of an export, by transformers alone.
PLAIN = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModel, AutoTokenizer

folder, texts = Path(sys.argv[1]), json.loads(sys.argv[2])
kinds = {m["type"].rpartition(".")[2]: folder / m["path"] for m in json.loads((folder / "modules.json").read_text())}
assert list(kinds) == ["Transformer", "Pooling", "Normalize"]
length = json.loads((kinds["Transformer"] / "sentence_bert_config.json").read_text())["max_seq_length"]
pooling = json.loads((kinds["Pooling"] / "config.json").read_text())
network, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
inputs = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
states, mask = network(**inputs).last_hidden_state, inputs["attention_mask"].unsqueeze(-1)
assert states.shape[-1] == pooling["word_embedding_dimension"]
ways = {"pooling_mode_cls_token": states[:, 0], "pooling_mode_mean_tokens": (states * mask).sum(1) / mask.sum(1)}
(chosen,) = [name for name, on in pooling.items() if on is True]
assert not [name for name in sys.modules if name.startswith("lm_lightning")]
print(json.dumps(torch.nn.functional.normalize(ways[chosen], dim=-1).tolist()))
"""


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.slow
def test_export_is_complete_for_other_programs(fit, cli, recipe: Path, tmp_path: Path, pooling: str):
    """A fresh process without this project computes the embeddings of `predict`."""
    texts = [row["text"] for row in rows(10, 7)]
    new = write(tmp_path / "new.jsonl", [{"text": text} for text in texts])
    run = fit("--model.pooling", pooling, "--data.max_length", 8)
    cli("predict", run, "--data.tables.predict", new)
    expected = np.load(evaluation(run) / "index" / "embeddings.npy")
    shutil.rmtree(run / "model")
    cli("export", run)  # from the checkpoint
    model = (run / "model").rename(tmp_path / "elsewhere")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    arguments = [python("transformers"), "-c", PLAIN, model, json.dumps(texts)]
    result = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    found = np.array(json.loads(result.stdout.splitlines()[-1]))
    assert np.allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_export_tells_its_pooling_to_the_next_run(fit, cli, recipe: Path):
    run = fit("--model.pooling", "cls")
    cli("export", run)  # from the checkpoint
    assert pooling_of(str(run / "model")) == "cls"
    names = {str(file.relative_to(run / "model")) for file in (run / "model").rglob("*.json")}
    assert {"modules.json", "1_Pooling/config.json", "sentence_bert_config.json"} <= names
    next_run = fit("--name", "next", "--model.network", "null", "--model.pretrained", run)
    assert pooling_of(str(next_run / "model")) == "cls"
    test = ("test", "--config", recipe, "--ckpt_path", run / "checkpoints" / "best.ckpt")
    scored = value(cli(*test, "--model.pooling", "cls"), "loss")
    assert value(cli(*test), "loss") == scored
    with pytest.raises(UserError, match="model.pooling is mean, but the checkpoint was made with cls"):
        cli(*test, "--model.pooling", "mean")
    file = run / "model" / "1_Pooling" / "config.json"
    file.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(UserError, match="has the pooling max_tokens, .*: give --model.pooling"):
        fit("--name", "next", "--model.network", "null", "--model.pretrained", run)


@pytest.mark.slow
def test_prompts_are_inserted_and_exported(fit, cli, recipe: Path, tmp_path: Path):
    """In the column of each, in the index, in the export, and in a run that starts from it."""
    with pytest.raises(UserError, match="a mapping: give a text .* as in --data.prompts '{query: \"rivers: \"}'"):
        fit("--data.prompts.query", "rivers: ")
    prompts = ("--data.prompts", '{query: "rivers: ", document: "old "}')
    run = fit(*prompts)
    settings = json.loads((run / "model" / "config_sentence_transformers.json").read_text())
    assert settings["prompts"] == {"query": "rivers: ", "document": "old "}
    texts = [row["text"] for row in rows(5, 9)]
    table = write(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    cli("predict", run, "--data.tables.predict", table)
    (index,) = run.glob("evaluations/*/index")
    expected = embeddings(run / "model", [f"old {text}" for text in texts])
    assert np.allclose(np.load(index / "embeddings.npy"), expected, atol=1e-5)
    (query,) = embeddings(run / "model", [f"rivers: {texts[0]}"])
    found = cli("search", run, texts[0], "--top", 1).split("\t")[0]
    assert float(found) == pytest.approx(float((expected @ query).max()), abs=2e-3)
    data = PairData(tokenizer=Tokenizer(str(run / "model")))
    module = SimpleNamespace(pretrained="x", pretrained_folder=lambda: str(run / "model"))
    data.trainer = SimpleNamespace(is_global_zero=True, lightning_module=module)  # type: ignore[assignment]
    data.start_encoding()
    assert (data.prompts.query, data.prompts.document) == ("rivers: ", "old ")
    first, second = split(data.encode("train", [Row({"text": texts[0], "pair": texts[1]}, "a:1")])[0])
    assert first == data.tokenizer(f"rivers: {texts[0]}")["input_ids"]
    assert second == data.tokenizer(f"old {texts[1]}")["input_ids"]


def loaded(model: Path) -> tuple:
    from transformers import AutoModel

    return AutoModel.from_pretrained(model).eval(), load(str(model))


def test_batches(tokenizer: Path):
    items = [
        {"input_ids": [2, 9, 3, 2, 8, 7, 3], "lengths": [3, 4], "targets": torch.tensor(0), "id": 4},
        {"input_ids": [2, 9, 9, 3, 2, 9, 3], "lengths": [4, 3], "targets": torch.tensor(0), "id": 5},
    ]
    batch = collate_pairs(load(str(tokenizer)), items)
    assert batch["input_ids"].tolist() == [[2, 9, 3, 0], [2, 9, 9, 3]] and batch["id"] == [4, 5]
    assert batch["candidate_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["keys"][0] == batch["candidate_keys"][1] != batch["keys"][1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--data.columns.pair", "nothing"), "there is no column 'nothing'"),
        (("--data.columns.negatives", "nothing"), "there is no column 'nothing'"),
        ((*SCORES, "--data.max_score", 1), r"train.jsonl:\d+: column 'score' is .* a number from 0 .* to 1"),
        (("--data.retrieval.validation", "qrels.tsv"), "data.retrieval.queries is missing"),
        (("--model.mini_batch_size", 0), "model.mini_batch_size is 0"),
        ((*SCORES, "--data.columns.negatives", "wrong"), "data.columns.negatives cannot be combined with"),
    ],
)
def test_refusals(fit, flags: tuple, message: str):
    with pytest.raises(UserError, match=message):
        fit(*flags)


def test_a_score_that_is_no_number_is_refused_with_its_row(tmp_path: Path, tokenizer: Path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": "a", "pair": "b", "score": score}) + "\n" for score in (1, "1,5")))
    tables = Tables(str(file), str(file))
    data = PairData(columns=PairColumns(score="score"), tables=tables, tokenizer=Tokenizer(str(tokenizer)))
    module = SimpleNamespace(own_labels=lambda: [], pretrained=None)
    fit = SimpleNamespace(fn="fit")
    data.trainer = SimpleNamespace(state=fit, is_global_zero=True, lightning_module=module)  # type: ignore[assignment]
    with pytest.raises(
        UserError, match="a.jsonl:2: column 'score' is .*, but must be a number .*use a decimal point instead"
    ):
        data.setup("fit")
