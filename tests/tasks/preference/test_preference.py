"""Preference tuning: what is learned from pairs of answers, with and without a reference network."""

import csv
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, evaluation, exists, needs, paragraphs
from processes import Runs
from test_fit import metrics, same, weights
from test_resuming import snapshots
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lm_lightning.checkpoints.loading import load_checkpoint
from lm_lightning.data.tokenizer import Tokenizer, train

TEXTS = [text[: 20 + 2 * i] for i, text in enumerate(paragraphs(24))]


def pairs() -> list[dict]:
    """Rows whose better answers are those in the morning, with prompts and answers of different lengths."""
    return [
        {"prompt": text, "chosen": f" The old captain sang {text[:9]}.", "rejected": f" It rained{text[5:15]}"}
        for i, text in enumerate(TEXTS)
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT with dropout."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train(Tokenizer(algorithm="bpe", vocab_size=300), iter(TEXTS), "gpt")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 128, "vocab_size": 300}
    config = AutoConfig.for_model("gpt2", bos_token_id=0, eos_token_id=0, initializer_range=0.2, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs()), encoding="utf-8")
    return folder


def flags(base: Path, *more: object) -> list[object]:
    """Flags of a run of four steps with an epoch of three."""
    return [
        *("--config", ROOT / "configs" / "preference.yaml", "--model.pretrained", base, "--data.max_length", 100),
        *("--data.tables.train", base / "pairs.jsonl", "--data.tables.validation_fraction", 0.3),
        *("--trainer.max_epochs", -1, "--trainer.max_steps", 4, "--trainer.accelerator", "cpu"),
        *("--trainer.log_every_n_steps", 1, "--trainer.val_check_interval", 1.0, "--trainer.precision", "32-true"),
        *("--model.optimizer.lr", 1e-2, "--trainer.accumulate_grad_batches", 1, "--model.schedule.warmup_ratio", 0),
        *("--last.every_n_train_steps", 1, *more),
    ]


def run_folder(out: str) -> Path:
    return Path(out.split("run folder: ")[1].splitlines()[0])


def plain(folder: Path, rows: list[dict]) -> list[list[float]]:
    """The log-probabilities of both answers by a plain forward pass of transformers, each on its own."""
    network, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for row in rows:
        found.append([])
        for answer in (row["chosen"], row["rejected"]):
            before, after = tokenizer(row["prompt"])["input_ids"], tokenizer(answer)["input_ids"] + [0]
            with torch.no_grad():
                log_p = network(torch.tensor([before + after])).logits[0].double().log_softmax(-1)
            found[-1].append(sum(log_p[len(before) - 1 + i, token].item() for i, token in enumerate(after)))
    return found


OPTIONS = {
    "dpo": (),
    "lora": ("--model.adapter", "LoRA", "--model.adapter.rank", 2, "--model.adapter.dropout", 0.1),
    "simpo": ("--model.objective", "SimPO"),
}
NEEDS = [kind for kind in OPTIONS if kind != "lora" or exists("lora")]


@pytest.mark.parametrize("kind", NEEDS)
def test_predictions_are_log_probabilities_of_plain_networks(kind: str, base: Path, cli, tmp_path: Path):
    """Of the exported network and the one before training; an evaluation finds what the run has logged."""
    run = run_folder(cli("fit", *flags(base, *OPTIONS[kind], "--runs_dir", tmp_path)))
    cli("predict", run, "--data.tables.predict", base / "pairs.jsonl", "--data.batch_size", 5)
    file = max(run.glob("evaluations/*/predictions.jsonl"))
    found = [json.loads(line) for line in file.read_text().splitlines()]
    expected, before = plain(run / "model", pairs()), plain(base, pairs())
    for row, own, other in zip(found, expected, before, strict=True):
        assert [row["log_prob_chosen"], row["log_prob_rejected"]] == pytest.approx(own, rel=1e-5)
        rewards = [0.1 * (a - b) for a, b in zip(own, other)]
        if kind == "simpo":
            rewards = [2 * a / row[f"tokens_{name}"] for a, name in zip(own, ("chosen", "rejected"))]
        assert [row["reward_chosen"], row["reward_rejected"]] == pytest.approx(rewards, abs=1e-4)
        assert row["margin"] == pytest.approx(rewards[0] - rewards[1], abs=1e-4)
        losses = {"simpo": -row["margin"] + 1}.get(kind, -row["margin"])
        assert row["loss"] == pytest.approx(math.log1p(math.exp(losses)), rel=1e-4)
    logged = rows_of(run)
    if kind != "simpo":
        assert logged[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert abs(logged[0]["train/margin"]) < 1e-5
    cli("validate", run)
    record = json.loads((evaluation(run, "validate") / "evaluation.json").read_text())["metrics"]
    last = {name: value for name, value in logged[-1].items() if name.startswith("val/")}
    assert len(last) == 7 and record == pytest.approx(last, abs=2e-4)
    assert last["val/margin"] > 0.1 and last["val/accuracy"] > 0.5


def rows_of(run: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv."""
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.mark.parametrize("kind", NEEDS[:2])
@pytest.mark.slow
def test_resumed_run_is_the_same_and_knows_its_reference(
    kind: str, base: Path, cli, refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With the dropout of the network, and of the adapter; the reference is not computed again."""
    arguments = flags(base, *OPTIONS[kind], "--runs_dir", tmp_path / "runs", "--model.dropout", "true")
    with monkeypatch.context() as patch:
        kept = snapshots(patch, tmp_path / "kept")
        whole = run_folder(cli("fit", *arguments))
    copies = {load_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"]: run for run in kept}
    copy = copies[2]  # in the middle of an epoch
    resume = ["--runs_dir", copy.parent.parent, "--ckpt_path", copy / "checkpoints" / "last.ckpt"]
    if kind == "dpo":
        saved = load_checkpoint(copy / "checkpoints" / "last.ckpt")["reference"]
        assert {split: len(part["log_probs"]) for split, part in saved.items()} == {"train": 19, "validation": 5}
        other = tmp_path / "other.jsonl"
        other.write_text(json.dumps(pairs()[0] | {"chosen": " A letter."}) + "\n")
        message = refused("fit", *arguments, *resume, "--data.tables.validation", other)
        assert "does not have the reference's log-probabilities of 1 rows of the validation split" in message
        message = refused("fit", *arguments, *resume, "--model.reference", tmp_path)
        assert f"the log-probabilities of the reference {base}, but this run's is {tmp_path}" in message
    out = cli("fit", *arguments, *resume)
    assert "computing the reference" not in out
    assert same(weights(copy), weights(whole)) and metrics(copy) == metrics(whole)


@pytest.mark.slow
def test_reference_that_does_not_exist_any_more_is_named(base: Path, cli, refused, tmp_path: Path):
    """Another one can be given; in training as well."""
    start = tmp_path / "start"
    shutil.copytree(base, start)
    given = tmp_path / "given"
    shutil.copytree(base, given)
    run = run_folder(cli("fit", *flags(start, "--runs_dir", tmp_path, "--model.reference", given)))
    assert json.loads((run / "model" / "preference.json").read_text()) == {"reference": str(given)}
    first = rows_of(run)[0]
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    shutil.rmtree(given)
    message = refused("validate", run)
    assert str(given) in message and "--model.reference" in message
    for weights_of in ((), ("--ckpt_path", "last")):
        cli("validate", run, "--model.reference", start, *weights_of)
        record = json.loads((evaluation(run, "validate") / "evaluation.json").read_text())["metrics"]
        assert record["val/margin"] == pytest.approx(rows_of(run)[-1]["val/margin"], abs=1e-4)


def test_long_and_empty_pairs_are_reported(base: Path, cli, refused, tmp_path: Path):
    long = [{"prompt": "the rain " * 60, "chosen": " a", "rejected": " b"}]
    equal = [{"prompt": "At night", "chosen": " a", "rejected": " a"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*long, *equal, *pairs()[:6]]))
    train_file = ("--data.tables.train", file, "--data.tables.validation", base / "pairs.jsonl")
    out = cli("fit", *flags(base, *train_file, "--runs_dir", tmp_path, "--trainer.max_steps", 1))
    assert "train: 7 rows" in out and "1 rows are truncated to 100 tokens" in out
    assert (
        "train: 1 rows have no answer, as their prompts have data.max_length tokens or more, 1 rows have equal" in out
    )
    file.write_text(json.dumps(long[0]) + "\n")
    message = refused("fit", *flags(base, *train_file, "--runs_dir", tmp_path))
    assert "no pair of the train split has an answer within data.max_length, 100 tokens" in message
    run = run_folder(out)
    cli("predict", run, "--data.tables.predict", base / "pairs.jsonl", "--data.max_length", 20)
    found = [json.loads(line) for line in max(run.glob("evaluations/*/predictions.jsonl")).read_text().splitlines()]
    assert len(found) == 24 and any(row["margin"] is None for row in found)


@pytest.mark.slow
def test_processes_and_micro_batches_change_nothing(base: Path, tmp_path: Path):
    """The mean over pairs and its gradient are the same, however the 4 pairs of a step are divided."""
    command = flags(base, "--trainer.max_steps", 3)
    two = ("--trainer.devices", 2, "--trainer.strategy")
    commands = {
        "one": ("fit", *command),
        "one_accumulated": ("fit", *command, "--data.batch_size", 1, "--trainer.accumulate_grad_batches", 4),
        "ddp": ("fit", *command, *two, "ddp", "--data.batch_size", 2),
    }
    if exists("sharding"):
        commands["fsdp2"] = ("fit", *command, *two, "fsdp2", "--data.batch_size", 2)
        commands["tp"] = ("fit", *command, *two, "tp")
    if exists("lora"):
        lora = (*OPTIONS["lora"][:4], "--trainer.max_steps", 3)
        commands["one_lora"] = ("fit", *command, *lora)
        commands["ddp_lora"] = ("fit", *command, *lora, *two, "ddp", "--data.batch_size", 2)
    runs = Runs(tmp_path)
    runs(commands)
    for name in commands.keys() - {"one", "one_lora"}:
        other = "one_lora" if "lora" in name else "one"
        training = ("train/loss", "train/margin", "train/accuracy", "train/gradient_norm", "train/log_prob_chosen")
        assert runs.differ(name, other, *training) < 1e-3, name
        assert runs.differ(name, other, "val/loss", "val/margin", "val/reward_chosen") < 1e-4, name


@needs("lora")
@pytest.mark.slow
def test_smollm2_learns_to_prefer_the_better_answers(smollm: Path, cli, tmp_path: Path):
    """With LoRA: margins grow on the training pairs, as plain transformers computes them with the merged network."""
    questions = ["What is the capital of France?", "How are you?", "Name a colour.", "What is 2 + 2?"]
    answers = ["Paris.", "I am fine.", "Blue.", "Four."]
    rows = [
        {"prompt": [{"role": "user", "content": question}]}
        | {"chosen": [{"role": "assistant", "content": answer.upper()}]}
        | {"rejected": [{"role": "assistant", "content": answer}]}
        for question, answer in zip(questions, answers)
    ]
    table = tmp_path / "pairs.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = cli(
        *(
            "fit",
            "--config",
            ROOT / "configs" / "preference.yaml",
            "--model.pretrained",
            smollm,
            "--runs_dir",
            tmp_path,
        ),
        *("--data.tables.train", table, "--data.tables.validation", table, "--data.max_length", 64),
        *("--trainer.max_epochs", -1, "--trainer.max_steps", 4, "--trainer.accumulate_grad_batches", 1),
        *("--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--model.optimizer.lr", 3e-4),
        *("--model.adapter", "LoRA", "--model.adapter.rank", 8, "--trainer.check_val_every_n_epoch", 4),
        *("--trainer.log_every_n_steps", 1, "--model.schedule.warmup_ratio", 0),
    )
    run = run_folder(out)
    logged = rows_of(run)
    assert logged[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert logged[-1]["val/margin"] > 0.3 and logged[-1]["val/accuracy"] == 1
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    margins = []
    for folder in (run / "model", smollm):
        network, sums = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), []
        for row in rows:
            before = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
            values = []
            for name in ("chosen", "rejected"):
                ids = tokenizer(before + row[name][0]["content"] + "<|im_end|>")["input_ids"]
                start = len(tokenizer(before)["input_ids"])
                with torch.no_grad():
                    log_p = network(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
                values.append(log_p.gather(1, torch.tensor(ids[1:]).unsqueeze(1))[start - 1 :].sum().item())
            sums.append(values[0] - values[1])
        margins.append(sum(sums) / len(sums))
    assert 0.1 * (margins[0] - margins[1]) == pytest.approx(logged[-1]["val/margin"], abs=1e-2)
