"""N-gram models: probabilities as defined by Kneser and Ney and by Chen and Goodman, on disk, by the usual commands."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter as Counts
from collections import defaultdict
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import optional, paragraphs
from transformers import AutoModelForCausalLM

from lm_lightning.baselines.counts import Counter, combine, merge, pack, token
from lm_lightning.baselines.kneser_ney import FALLBACK, discounts_of, estimate
from lm_lightning.baselines.ngram import NGramConfig, NGramForCausalLM

V, ORDER = 7, 4


def text(size: int, seed: int = 0) -> list[list[int]]:
    """Documents of tokens, some of them frequent."""
    draw = np.random.default_rng(seed)
    return [(draw.integers(0, V, 20) * draw.integers(0, 2, 20)).tolist() for _ in range(size)]


def counted(documents: list[list[int]], folder: Path, limit: int, vocab_size: int = V) -> NGramForCausalLM:
    """A model of documents, whose first tokens are known."""
    counter = Counter(folder, ORDER, limit)
    network = NGramForCausalLM(NGramConfig(vocab_size=vocab_size, order=ORDER)).eval()
    for document in documents:
        windows, known = network.windows(torch.tensor([document]))
        rows = slice(0, len(document) - 1)
        counter.add(windows[0, rows].numpy(), known[0, rows].numpy(), np.array(document[1:]))
    (folder / "tables").mkdir()
    network.set_tables(estimate(counter.adjusted(folder / "tables"), vocab_size, folder / "tables", limit))
    return network


def slow(documents: list[list[int]]):
    """An implementation of its own, from the definition: a function of a context and a token."""
    raw: list[Counts] = [Counts() for _ in range(ORDER + 1)]
    for document in documents:
        for end in range(1, len(document)):
            start = max(0, end - ORDER + 1)
            raw[end - start + 1][tuple(document[start : end + 1])] += 1
    adjusted = [Counts() for _ in range(ORDER + 1)]
    adjusted[ORDER] = raw[ORDER]
    for n in range(ORDER - 1, 0, -1):
        before = defaultdict(set)
        for ngram in adjusted[n + 1]:
            before[ngram[1:]].add(ngram[0])
        adjusted[n] = Counts({ngram: len(tokens) for ngram, tokens in before.items()}) + raw[n]
    discounts = [[0.0, 0.0, 0.0, 0.0]]
    for n in range(1, ORDER + 1):
        of = Counts(adjusted[n].values())
        values = FALLBACK
        if all(of[i] for i in (1, 2, 3, 4)):
            y = of[1] / (of[1] + 2 * of[2])
            found = [i - (i + 1) * y * of[i + 1] / of[i] for i in (1, 2, 3)]
            values = tuple(found) if all(0 <= d <= i for i, d in enumerate(found, 1)) else FALLBACK
        discounts.append([0.0, *values])

    def p(context: tuple[int, ...], word: int) -> float:
        n = len(context) + 1
        after = {ngram[-1]: count for ngram, count in adjusted[n].items() if ngram[:-1] == context}
        shorter = 1 / V if n == 1 else p(context[1:], word)
        if not after:
            return shorter
        total = sum(after.values())
        taken = sum(discounts[n][min(count, 3)] for count in after.values())
        count = after.get(word, 0)
        return (count - discounts[n][min(count, 3)] + taken * shorter) / total

    return p


@pytest.mark.parametrize("limit", [10, 100_000], ids=["in parts", "in memory"])
def test_probabilities_are_those_of_the_definition(limit: int, tmp_path: Path):
    documents = text(30)
    network, p = counted(documents, tmp_path, limit), slow(documents)
    for context in [(), *product(range(V), repeat=1), (0, 0), (3, 0), *((0, a, b) for a in range(V) for b in range(V))]:
        found = network(torch.tensor([context])).logits[0, -1].exp() if context else network.unigrams.weight[:, 0]
        assert found.tolist() == pytest.approx([p(context, word) for word in range(V)], abs=1e-6), context


def test_probabilities_sum_to_one_after_each_context(tmp_path: Path):
    network = counted(text(30), tmp_path, 1000)
    for size in range(1, ORDER + 1):
        contexts = torch.tensor(list(product(range(V), repeat=size)))
        total = network(contexts).logits[:, -1].double().exp().sum(1)
        assert torch.allclose(total, torch.ones_like(total), atol=1e-6)


def test_targets_are_looked_up_as_all_tokens_are(tmp_path: Path):
    network = counted(text(30), tmp_path, 1000)
    tokens = torch.tensor(text(5, seed=1))
    windows, known = (t.flatten(0, 1) for t in network.windows(tokens))
    targets = tokens.roll(-1, 1).flatten()
    own = network.probabilities_of(windows, known, targets)
    assert torch.allclose(own, network.probabilities(windows, known).gather(1, targets[:, None])[:, 0])


def test_documents_and_padding_are_no_context(tmp_path: Path):
    network = counted(text(30), tmp_path, 1000)
    tokens = torch.tensor(text(1, seed=1))[:, :8]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    assert torch.equal(network(tokens, position_ids=positions).logits[:, 3:], network(tokens[:, 3:]).logits)
    mask = (torch.arange(8) >= 3).long().unsqueeze(0)
    assert torch.equal(network(tokens, attention_mask=mask).logits[:, 3:], network(tokens[:, 3:]).logits)


def test_merging_in_parts_counts_as_merging_at_once(tmp_path: Path):
    draw = np.random.default_rng(0)
    parts = [combine(pack(draw.integers(0, 5, (500, 4)), np.ones(500))) for _ in range(4)]
    whole = combine(np.concatenate(parts))
    for limit in (7, 100, 10_000):
        assert np.array_equal(merge(parts, tmp_path / f"{limit}", limit), whole)
    assert whole[:, 2].sum() == 2000
    tokens = np.stack([token(whole, place) for place in range(4)], 1)
    assert np.array_equal(tokens, np.unique(tokens, axis=0))


def test_discounts_of_few_counts_are_fixed():
    assert discounts_of([10, 5, 3, 2])[1] and discounts_of([10, 5, 0, 2]) == (FALLBACK, False)


def test_probabilities_are_those_of_kenlm(tmp_path: Path):
    kenlm = pytest.importorskip("kenlm")
    if shutil.which("lmplz") is None:
        pytest.skip("needs lmplz of KenLM")
    documents = [paragraph.split() for paragraph in paragraphs(600)]
    train, held_out = documents[:500], documents[500:]
    words = sorted({word for document in train for word in document})
    ids = {"</s>": 0, "<unk>": 1} | {word: number for number, word in enumerate(words, start=2)}
    (tmp_path / "train.txt").write_text("".join(" ".join(document) + "\n" for document in train))
    settings = ["-o", str(ORDER), "--discount_fallback", "-S", "100M", "-T", str(tmp_path)]
    with open(tmp_path / "train.txt") as source, open(tmp_path / "model.arpa", "w") as target:
        subprocess.run(["lmplz", *settings], stdin=source, stdout=target, stderr=subprocess.DEVNULL, check=True)
    model = kenlm.Model(str(tmp_path / "model.arpa"))

    def tokens(document: list[str]) -> list[int]:  # a document begins after the end of another
        return [0, *(ids.get(word, 1) for word in document), 0]

    network = counted([tokens(document) for document in train], tmp_path / "counts", 1000, len(ids))
    for document in held_out:
        expected = [10**score for score, *_ in model.full_scores(" ".join(document))]
        windows, known = network.windows(torch.tensor([tokens(document)]))
        targets = torch.tensor(tokens(document)[1:])
        found = network.probabilities_of(windows[0, :-1], known[0, :-1], targets)
        assert found.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope="module")
def flags() -> tuple[object, ...]:
    network = '{"model_type": "ngram", "order": 4}'
    return (
        *("--model", "NGramLM", "--model.network", network, "--trainer.max_epochs", 1, "--trainer.max_steps", -1),
        *("--trainer.val_check_interval", 0.5, "--trainer.check_val_every_n_epoch", 1, "--data.batch_size", 16),
    )


@pytest.mark.slow
def test_fit_counts_resumes_exports_and_generates(fit, cli, flags, tmp_path: Path, recipe: Path):
    recipe.write_text(re.sub(r"  +(optimizer|schedule):\n(    +.*\n)+", "", recipe.read_text()))
    full = fit(*flags)
    part = fit(*flags, "--trainer.max_steps", 5, "--name", "part")
    assert fit(*flags, "--name", "part", "--ckpt_path", "last") == part
    saved = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (full, part)]
    assert all(torch.equal(saved[0]["state_dict"][name], tensor) for name, tensor in saved[1]["state_dict"].items())
    blocks = int(np.unpackbits(saved[0]["ngrams"]["counted"].numpy()).sum())
    assert saved[0]["ngrams"]["total"] == 32 * blocks == saved[1]["ngrams"]["total"]  # each sample once
    assert "bits_per_byte" in cli("validate", full)
    cli("predict", full)
    rows = [json.loads(line) for line in next(full.rglob("predictions*.jsonl")).read_text().splitlines()]
    assert sum(row["tokens"] for row in rows) > 0
    cli("export", full, "--output", tmp_path / "exported")
    script = (
        "import sys, torch, lm_lightning.baselines.networks\n"
        "from transformers import AutoModelForCausalLM\n"
        "network, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info\n"
        "print(network(torch.arange(9).unsqueeze(0)).logits.exp().sum().item())\n"
    )
    words = [sys.executable, "-c", script, str(tmp_path / "exported")]
    result = subprocess.run(words, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == pytest.approx(9, abs=1e-4)
    network = AutoModelForCausalLM.from_pretrained(full / "model")
    assert network.config.sizes == [len(saved[0]["state_dict"][f"network.keys_{n}"]) for n in (2, 3, 4)]
    optional("generation.generate.generate")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The old captain watched\nMy neighbour\n")
    outputs = [
        cli("generate", full, "--prompts_file", prompts, "--batch_size", size, "--max_new_tokens", 8) for size in (1, 2)
    ]
    assert outputs[0] == outputs[1] and outputs[0].count("\n") == 2
