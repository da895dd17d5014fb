"""Encoder-decoders: they learn to write, score what they write, resume exactly, and export complete settings."""

import csv
import gzip
import itertools
import json
import random
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, evaluation, exists, needs, unchanged
from forks import python
from lightning.pytorch import Callback, Trainer
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from lm_lightning.data.order import PADDING
from lm_lightning.errors import UserError
from lm_lightning.finetuning.token_batches import TokenBatches, TokenBatchSampler, TokenEvaluationBatches
from lm_lightning.losses import linear_losses
from lm_lightning.tasks.seq2seq import model
from lm_lightning.tasks.seq2seq.data import PairExamples, Seq2SeqData
from lm_lightning.tasks.seq2seq.model import Seq2Seq
from lm_lightning.tasks.seq2seq.smoothing import Smoothing

WORDS = {"anna": "ANA", "boris": "BORI", "sees": "SI", "the": "LA", "red": "RUGE", "house": "HUS", "river": "FLU"}
SIZES = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
BART = {"model_type": "bart", "d_model": 48, **SIZES, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
BART |= {"max_position_embeddings": 128, "dropout": 0.0, "attention_dropout": 0.0, "init_std": 0.1}


def pairs(number: int, seed: int) -> list[tuple[str, str]]:
    """Sentences of different lengths, and their words in another language."""
    draw = random.Random(seed)
    sentences = [draw.choices(list(WORDS), k=draw.randint(1, 4)) for _ in range(number)]
    return [(" ".join(words), " ".join(WORDS[word] for word in words)) for words in sentences]


def write(folder: Path, name: str, rows: list[tuple[str, str]]) -> list[str]:
    """Parallel files, the targets compressed."""
    (folder / f"{name}.x").write_text("".join(f"{source}\n" for source, _ in rows), encoding="utf-8")
    with gzip.open(folder / f"{name}.y.gz", "wt", encoding="utf-8") as file:
        file.writelines(f"{target}\n" for _, target in rows)
    return [str(folder / f"{name}.x"), str(folder / f"{name}.y.gz")]


def make_recipe(folder: Path) -> Path:
    """A tiny BART that learns the words in some two hundred steps."""
    files = {name: write(folder, name, pairs(n, i)) for i, (name, n) in enumerate({"train": 600, "dev": 40}.items())}
    model = {
        "network": BART,
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 5e-3}},
        "schedule": {"warmup_steps": 2},
        "label_smoothing": 0.1,
        "decoding": {"num_beams": 2, "max_new_tokens": 20},
        "evaluation": {"scores": [{"class_path": "ExactMatch"}], "rows": 20, "batch_size": 8, "samples": 2},
    }
    data = {
        "parallel": {"train": files["train"], "validation": files["dev"], "test": files["dev"]},
        "tokenizer": {"vocab_size": 300},
        "max_tokens": 200,
    }
    trainer = {"max_steps": 8, "val_check_interval": 4, "check_val_every_n_epoch": None, "log_every_n_steps": 1}
    trainer |= {"accelerator": "cpu", "precision": "32-true", "gradient_clip_val": 1.0}
    content = {
        "model": {"class_path": "Seq2Seq", "init_args": model},
        "data": {"class_path": "Seq2SeqData", "init_args": data},
        "trainer": trainer,
        "best": {"monitor": "val/exact_match"},
        "runs_dir": str(folder / "runs"),
    }
    file = folder / "pairs.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return make_recipe(tmp_path)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory):
    """A run that has learned the words."""
    folder = tmp_path_factory.mktemp("learned")
    file = make_recipe(folder)
    words = ["fit", "--config", file, "--trainer.max_steps", 300, "--trainer.val_check_interval", 150]
    result = subprocess.run(
        [python("lm_lightning"), "-m", "lm_lightning", *map(str, words)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    (run,) = (folder / "runs" / "pairs").iterdir()
    with unchanged(run):
        yield run


def metrics(run: Path, name: str) -> list[float]:
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


@pytest.mark.slow
def test_what_is_learned_is_written_scored_and_exported(learned: Path, cli, tmp_path: Path):
    assert metrics(learned, "val/exact_match")[-1] > 0.9
    samples = [json.loads(line) for line in (learned / "samples.jsonl").read_text().splitlines()]
    assert samples[-1]["step"] == 300 and samples[-1].keys() == {"step", "prompt", "text", "reference"}
    new = pairs(30, 7)
    (tmp_path / "new.x").write_text("".join(f"{source}\n" for source, _ in new))
    cli("predict", learned, "--data.parallel.predict", tmp_path / "new.x")
    lines = (evaluation(learned) / "predictions.jsonl").read_text().splitlines()
    predicted = [json.loads(line) for line in lines]
    assert [row["id"] for row in predicted] == list(range(30))
    assert sum(row["text"] == target for row, (_, target) in zip(predicted, new)) > 25
    # plain transformers, in a process that knows nothing of this project, without any setting
    code = (
        "import json, sys; from transformers import AutoModelForSeq2SeqLM, AutoTokenizer\n"
        "network, tokenizer = (c.from_pretrained(sys.argv[1]) for c in (AutoModelForSeq2SeqLM, AutoTokenizer))\n"
        "inputs = tokenizer(json.loads(sys.argv[2]), return_tensors='pt', padding=True)\n"
        "print(json.dumps(tokenizer.batch_decode(network.generate(**inputs), skip_special_tokens=True)))"
    )
    words = [python("transformers"), "-c", code, learned / "model", json.dumps([source for source, _ in new])]
    result = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=tmp_path, timeout=200)
    assert json.loads(result.stdout.splitlines()[-1]) == [row["text"] for row in predicted], result.stderr


@pytest.mark.slow
def test_commands_for_other_networks_refuse_encoder_decoders_or_work(fit, refused, cli, tmp_path: Path):
    run = fit("--trainer.max_steps", 3, "--trainer.val_check_interval", 3)
    assert "is an encoder-decoder, which writes a text for a text" in refused("generate", run, "--prompt", "anna")
    cli("export", run)
    if exists("compression"):
        out = cli("compress", run, "--recipe", "sparse=0.5", "--output", tmp_path / "c", "--seconds", 0.01)
        assert "sparse=0.5: measured" in out


@pytest.mark.slow
def test_scores_do_not_depend_on_batches_or_on_an_interrupted_evaluation(learned: Path, cli, monkeypatch):
    def scores(*flags: object) -> dict:
        cli("test", learned, *flags)
        return json.loads((evaluation(learned, "test") / "evaluation.json").read_text())["metrics"]

    first = scores()
    other = scores("--data.max_tokens", 60, "--model.evaluation.batch_size", 3)
    assert first.keys() == {"test/loss", "test/perplexity", "test/exact_match"} == other.keys()
    assert first == pytest.approx(other, rel=1e-5)
    write_texts, batches = model.write_texts, iter(range(2))

    def interrupted(*arguments: object) -> list[str]:
        if next(batches, None) is None:
            raise RuntimeError("power failure")
        return write_texts(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(model, "write_texts", interrupted)
        with pytest.raises(RuntimeError, match="power failure"):
            cli("test", learned)
    assert scores() == first


class Stop(Callback):
    """Ends a run as a power failure would, amid training or in a validation.

    Args:
        validating: Whether it is in a validation.
    """

    def __init__(self, validating: bool = False) -> None:
        self.validating = validating

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == 6 and not self.validating:
            raise RuntimeError("power failure")

    def on_validation_batch_end(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == 4 and self.validating:
            raise RuntimeError("power failure")


def weights(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize("validating", [False, True])
def test_interrupted_run_ends_in_the_same_bits(fit, recipe: Path, validating: bool):
    flags = ("--trainer.accumulate_grad_batches", 2, "--model.network.dropout", 0.1)
    flags = (*flags, "--trainer.max_steps", 10, "--last.every_n_train_steps", 4)
    whole = fit(*flags)
    with pytest.raises(RuntimeError, match="power failure"):
        stop = {"class_path": "test_seq2seq.Stop", "init_args": {"validating": validating}}
        fit(*flags, "--name", "cut", "--trainer.callbacks", json.dumps([stop]))
    (cut,) = (recipe.parent / "runs" / "cut").iterdir()
    assert torch.load(cut / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4
    fit(*flags, "--name", "cut", "--ckpt_path", "last")
    assert all(torch.equal(tensor, weights(cut)[name]) for name, tensor in weights(whole).items())
    assert metrics(cut, "train/loss") == metrics(whole, "train/loss") and len(metrics(cut, "train/loss")) == 10
    assert metrics(cut, "val/exact_match") == metrics(whole, "val/exact_match")
    with pytest.raises(UserError, match="data.max_tokens 200, but this run has 100"):
        fit("--name", "cut", "--ckpt_path", "last", *flags, "--trainer.max_steps", 12, "--data.max_tokens", 100)


@pytest.mark.slow
def test_two_processes_do_what_one_does(fit, recipe: Path):
    one = fit("--trainer.accumulate_grad_batches", 2)
    launcher = [python("lm_lightning"), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--name", "two"]
    result = subprocess.run(
        [*launcher, "-m", "lm_lightning", "fit", "--config", recipe, *flags],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    (two,) = (recipe.parent / "runs" / "two").iterdir()
    for name in ("train/loss", "train/gradient_norm", "val/loss", "val/exact_match"):
        assert metrics(two, name) == pytest.approx(metrics(one, name), abs=1e-4), name
    samples = [(run / "samples.jsonl").read_text() for run in (one, two)]
    assert samples[0] == samples[1]


def test_batches_have_a_budget_and_resume_anywhere():
    draw = np.random.default_rng(0)
    batches = TokenBatches(draw.integers(1, 40, (500, 2)), 300, seed=3)
    for number in range(3):
        order, starts = batches.epoch(number)
        assert sorted(order) == list(range(500))
        for rows in np.split(order, starts[1:]):
            longest = batches.lengths[rows].max(0).sum()
            assert len(rows) * longest <= 300
    assert not np.array_equal(batches.epoch(0).order, batches.epoch(1).order)
    stream = list(itertools.islice(batches.after(0), 300))
    assert [place for batch in stream for place in batch] == list(range(stream[-1].stop))
    for number in (0, 7, 120, 250):
        assert list(itertools.islice(batches.after(stream[number].start), 40)) == stream[number : number + 40]
    # two processes read the batches of one, in turn
    one = list(TokenBatchSampler(batches, 2, 0, 1, lambda: stream[4].start))
    two = [list(TokenBatchSampler(batches, 1, rank, 2, lambda: stream[4].start)) for rank in range(2)]
    assert one == [batch for pair in zip(*two) for batch in pair]


def test_position_after_a_step_is_that_of_all_processes():
    """Although another process has had other numbers of rows."""
    data = Seq2SeqData(max_tokens=60)
    data.collate = dict
    draw = np.random.default_rng(0)
    rows = [{"input_ids": [1] * draw.integers(1, 20), "targets": torch.zeros(draw.integers(1, 20))} for _ in range(90)]
    data.examples["train"] = PairExamples(rows, 1, 60)
    strategy = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 2, "rank": 0})
    data.trainer = SimpleNamespace(strategy=strategy, accumulate_grad_batches=2, overfit_batches=0)
    sampler = data.train_dataloader().batch_sampler
    stream = list(itertools.islice(sampler.batches.after(0), 80))
    for step in range(1, 15):
        data.advance(len(stream[4 * step - 4]) + len(stream[4 * step - 2]))
        assert data.consumed == stream[4 * step - 1].stop


def test_evaluation_batches_have_each_row_once():
    lengths = np.random.default_rng(0).integers(1, 40, (101, 2))
    for size in (1, 2, 3):
        ranks = [list(TokenEvaluationBatches(lengths, 200, rank, size)) for rank in range(size)]
        assert len({len(batches) for batches in ranks}) == 1
        rows = [row for batches in ranks for batch in batches for row in batch if row != PADDING]
        assert sorted(rows) == list(range(101))


def test_label_smoothing_is_that_of_pytorch():
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 5, requires_grad=True), torch.randn(12, 5, requires_grad=True)
    targets = torch.tensor([3, -100, 2, 0, 9, -100, 1, 1, 4])
    loss, _ = linear_losses(hidden, weight, None, targets, 10, Smoothing(0.2))
    ours = torch.autograd.grad(loss, (hidden, weight))
    logits = (hidden @ weight.T)[:, :10]
    expected = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.2, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, theirs in zip(ours, torch.autograd.grad(expected, (hidden, weight))):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_training_without_data_is_refused_with_both_ways_to_give_it(cli, tmp_path: Path):
    with pytest.raises(UserError, match="no training data: .*--data.parallel.train .*--data.tables.train"):
        cli("fit", "--config", ROOT / "configs" / "translation.yaml", "--runs_dir", tmp_path)


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_the_same_for_networks_with_logits_of_their_own(monkeypatch, training: bool):
    """As if the logits were more than the output of the head."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**BART, vocab_size=64, pad_token_id=1, decoder_start_token_id=2)
    module = Seq2Seq(network=BART, label_smoothing=0.2)
    module.network = AutoModelForSeq2SeqLM.from_config(config).train(training)
    monkeypatch.setattr(Seq2Seq, "vocab_size", 60)
    tokens = torch.randint(3, 60, (2, 5))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "targets": tokens.clone()}
    batch["targets"][1, 3:] = -100
    losses = []
    for module.has_linear_head in (True, False):
        loss, count = module.loss(batch)
        losses.append((loss.item(), count.item()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@needs("compression")
def test_distillation_mixes_the_loss_with_the_divergence_from_the_teacher(monkeypatch):
    """From a network with the same weights, there is none."""
    from lm_lightning.compression.distilling import Distiller

    config = AutoConfig.for_model(**BART, vocab_size=64, pad_token_id=1, decoder_start_token_id=2)
    monkeypatch.setattr(Seq2Seq, "vocab_size", 60)
    student, teacher = (Seq2Seq(network=BART, label_smoothing=0.2) for _ in range(2))
    for seed, module in enumerate((student, teacher)):
        torch.manual_seed(seed)
        module.network, module.has_linear_head = AutoModelForSeq2SeqLM.from_config(config), True
    student.network.train()
    tokens = torch.randint(3, 60, (2, 5))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "targets": tokens.clone()}
    batch["targets"][1, 3:] = -100
    own, count = student.loss(batch)
    loss, same_count, distance = student.distillation_loss(batch, teacher, Distiller(0.3, 2.0))
    log_p, log_q = ((module.logits(batch)[..., :60] / 2).log_softmax(-1) for module in (student, teacher))
    apart = 4 * (log_q.exp() * (log_q - log_p)).sum(-1)[batch["targets"] != -100].sum()
    assert distance.item() == pytest.approx(apart.item(), rel=1e-4) and distance > 0.1 and same_count == count == 8
    assert loss.item() == pytest.approx(0.7 * own.item() + 0.3 * apart.item(), rel=1e-4)
    assert abs(student.distillation_loss(batch, student, Distiller(0.3, 2.0))[2].item()) < 1e-5


NETWORKS = {
    "t5": {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_kv": 16, "d_ff": 32, "dropout_rate": 0.0},
    "marian": {k: v for k, v in BART.items() if k not in ("model_type", "dropout", "attention_dropout")},
    "mbart": {k: v for k, v in BART.items() if k != "model_type"},
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_other_networks(fit, cli, recipe: Path, kind: str):
    """The loss is that of plain transformers for the exported network, with its own shift of the labels."""
    network = json.dumps({"model_type": kind} | NETWORKS[kind])
    run = fit("--model.network", network, "--trainer.max_steps", 3, "--trainer.val_check_interval", 3)
    kind_of = AutoModelForSeq2SeqLM.from_pretrained(run / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    total, count = 0.0, 0
    for source, target in pairs(40, 1):
        inputs = tokenizer(source, return_tensors="pt")
        labels = tokenizer(text_target=target, return_tensors="pt")["input_ids"]
        start = kind_of.config.decoder_start_token_id
        shifted = torch.cat([torch.tensor([[start]]), labels[:, :-1]], 1)
        with torch.no_grad():
            logits = kind_of(**inputs, decoder_input_ids=shifted).logits
        total += torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum").item()
        count += labels.numel()
    assert metrics(run, "val/loss")[-1] == pytest.approx(total / count, rel=1e-4)
    assert kind_of.generation_config.max_new_tokens == 20 and kind_of.generation_config.num_beams == 2
    assert kind_of.config.vocab_size == len(tokenizer)


def test_unequal_parallel_files_are_refused_with_both_numbers(refused, recipe: Path, tmp_path: Path):
    source, target = write(tmp_path, "odd", pairs(7, 0))
    with open(source, "a") as file:
        file.write("one more\nand another\n")
    message = refused("fit", "--config", recipe, "--data.parallel.train", json.dumps([source, target]))
    assert "has 9 lines" in message and "has 7" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--data.max_tokens", 10), "data.max_tokens is 10, but a row of the train split has"),
        (("--data.max_length", 130), "positions for 128 tokens"),
        (("--model.decoding.max_new_tokens", 200), "max_new_tokens is 200, but this network has positions for 128"),
        (("--model.decoding.num_beams", 0), "num_beams is 0, but must be 1 or more"),
        (("--model.label_smoothing", 1), "label_smoothing is 1"),
        (("--data.target_language", "de_DE"), "a new tokenizer has no languages, but data has de_DE"),
        (("--best.monitor", "val/bleu"), "best.monitor is val/bleu, which this run does not log"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_mistakes_are_refused_in_one_sentence(refused, recipe: Path, flags: tuple, message: str):
    assert message in refused("fit", "--config", recipe, *flags)


def test_rows_without_text_are_counted_and_lists_are_references(cli, recipe: Path, tmp_path: Path):
    rows = [{"x": [source, "too"], "y": [target, "SECOND"]} for source, target in pairs(20, 0)]
    rows += [{"x": "", "y": "A"}, {"x": "b", "y": None}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = yaml.safe_load(recipe.read_text())
    del content["data"]["init_args"]["parallel"]
    recipe.write_text(yaml.safe_dump(content))
    flags = ("--data.tables.train", tmp_path / "rows.jsonl", "--data.tables.validation", tmp_path / "rows.jsonl")
    flags = (*flags, "--data.columns.source", "x", "--data.columns.target", "y", "--trainer.max_steps", 1)
    out = cli("fit", "--config", recipe, *flags, "--model.schedule.warmup_steps", 0, "--trainer.val_check_interval", 1)
    assert "train: 2 rows without a source or a target are omitted" in out
    assert "train: 40 rows" in out and "validation: 22 rows" in out
    (run,) = (tmp_path / "runs" / "pairs").iterdir()
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"].endswith(" too") and sample["reference"].endswith(" / SECOND")
