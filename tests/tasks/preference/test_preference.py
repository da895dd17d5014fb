"""Preference tuning: what is learned from pairs of answers, with and without a reference network."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, paragraphs
from test_fit import metrics
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

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


@pytest.fixture(scope="module")
def trained() -> dict[str, Path]:
    """Runs by their objective."""
    return {}


@pytest.mark.parametrize("kind", ["dpo", "lora", "simpo"])
def test_predictions_are_log_probabilities_of_plain_networks(kind: str, base: Path, cli, tmp_path: Path):
    """Of the exported network, by what is in the folders, with the rewards that training has logged."""
    options = {
        "dpo": (),
        "lora": ("--model.adapter", "LoRA", "--model.adapter.rank", 2, "--model.adapter.dropout", 0.1),
        "simpo": ("--model.objective", "SimPO"),
    }
    if kind == "lora":
        pytest.importorskip("peft")
    out = cli("fit", *flags(base, *options[kind], "--runs_dir", tmp_path))
    run = run_folder(out)
    cli("predict", run, "--data.tables.predict", base / "pairs.jsonl", "--data.batch_size", 5)
    file = max(run.glob("evaluations/*/predictions.jsonl"))
    found = [json.loads(line) for line in file.read_text().splitlines()]
    expected, before = plain(run / "model", pairs()), plain(base, pairs())
    for row, own, other in zip(found, expected, before, strict=True):
        assert [row["log_prob_chosen"], row["log_prob_rejected"]] == pytest.approx(own, abs=1e-3)
        rewards = [0.1 * (a - b) for a, b in zip(own, other)]
        if kind == "simpo":
            rewards = [2 * a / row[f"tokens_{name}"] for a, name in zip(own, ("chosen", "rejected"))]
        assert [row["reward_chosen"], row["reward_rejected"]] == pytest.approx(rewards, abs=1e-3)
        assert row["margin"] == pytest.approx(rewards[0] - rewards[1], abs=1e-3)
    shown = cli("validate", run)
    assert f"{metrics(run)[-1]}"
    print(out, shown, metrics(run))
