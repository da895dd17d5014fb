"""Losses, rewards and gradients are those of TRL for the same pairs. TRL is in no extra: the tests skip without it."""

import json
import re
from pathlib import Path

import pytest
import torch
from test_preference import base, pairs  # noqa: F401 (a fixture)
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_lightning.models.module import LanguageModule

pytest.importorskip("trl")
FORMATS = ("texts", "messages")


def rows(kind: str) -> list[dict]:
    """Pairs as texts, or as messages with an earlier turn of the assistant in the prompt."""
    if kind == "texts":
        return pairs()[:6]
    first = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "The rain."}]
    return [
        {"prompt": [*first, {"role": "user", "content": row["prompt"]}]}
        | {name: [{"role": "assistant", "content": row[name].strip()}] for name in ("chosen", "rejected")}
        for row in pairs()[:6]
    ]


@pytest.fixture(scope="module")
def policy(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The base, a little changed, with a chat template."""
    folder = tmp_path_factory.mktemp("policy")
    network, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def command(name: str, tmp_path: Path, policy: Path, kind: str, *options: object) -> tuple:
    """A command with all pairs in a batch."""
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(kind)))
    return (
        *(name, "--config", Path(__file__).parents[3] / "configs" / "preference.yaml", "--runs_dir", tmp_path),
        *("--model.pretrained", policy, "--data.tables.validation", file, "--data.max_length", 120),
        *("--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--data.batch_size", 6, *options),
        *(("--data.chat_template", "headings") if kind == "messages" else ()),
    )


def our_metrics(cli, *arguments: object) -> dict[str, float]:
    """What `validate` shows."""
    out = cli(*command("validate", *arguments))
    return {m[1]: float(m[2]) for m in re.finditer(r"│ +val/(\S+) +│ +([\d.e+-]+) +│", out)}


def assert_gradients_equal(theirs: torch.nn.Module, cli, tmp_path: Path, *arguments: object) -> None:
    """Those of the first step, and those of a network of TRL after `backward`."""
    ours: dict[str, torch.Tensor] = {}

    def note(module: LanguageModule, *_: object, **__: object) -> None:
        ours.update({name: p.grad.clone() for name, p in module.network.named_parameters() if p.grad is not None})

    once = ("--trainer.max_steps", 1, "--trainer.accumulate_grad_batches", 1, "--trainer.limit_val_batches", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModule, "configure_gradient_clipping", note)
        cli(*command("fit", tmp_path, *arguments), "--data.tables.train", tmp_path / "pairs.jsonl", *once)
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert ours.keys() == expected.keys() and len(ours) > 10
    largest = max(gradient.abs().max() for gradient in expected.values())
    difference = max((ours[name] - expected[name]).abs().max() for name in ours)
    print(f"gradients: the largest is {largest:.6f}, the largest difference {difference:.2e}")
    assert difference < 1e-5 < 0.01 * largest


def trl_batch(trainer) -> dict:
    return next(iter(trainer.get_train_dataloader()))


def parts(policy: Path, tmp_path: Path, kind: str):
    """TRL's data set, tokenizer and common settings."""
    from datasets import Dataset

    from lm_lightning.generation.chat import TEMPLATES

    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.pad_token, tokenizer.split_special_tokens = tokenizer.eos_token, False  # TRL appends the end as text
    tokenizer.chat_template = TEMPLATES["headings"]
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": [], "max_length": 120}
    return Dataset.from_list(rows(kind)), tokenizer, settings | {"per_device_train_batch_size": 6}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_dpo(kind: str, base: Path, policy: Path, cli, tmp_path: Path):  # noqa: F811
    from trl import DPOConfig, DPOTrainer

    data, tokenizer, settings = parts(policy, tmp_path, kind)
    network, reference = (AutoModelForCausalLM.from_pretrained(folder) for folder in (policy, base))
    trainer = DPOTrainer(network, reference, DPOConfig(**settings), train_dataset=data, processing_class=tokenizer)
    loss = trainer.compute_loss(trainer.model, trl_batch(trainer))
    loss.backward()
    assert_gradients_equal(trainer.model, cli, tmp_path, policy, kind, "--model.reference", base)
    loss = loss.item()
    logged = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
    ours = our_metrics(cli, tmp_path, policy, kind, "--model.reference", base)
    print(f"DPO, {kind}: TRL {loss:.8f}, here {ours['loss']:.8f}; margin {logged['rewards/margins']}, {ours['margin']}")
    assert ours["loss"] == pytest.approx(loss, abs=1e-5) and abs(loss - 0.6931) > 0.001
    for name, theirs in (("margin", "margins"), ("reward_chosen", "chosen"), ("reward_rejected", "rejected")):
        assert ours[name] == pytest.approx(logged[f"rewards/{theirs}"], abs=1e-5)
    assert ours["log_prob_chosen"] == pytest.approx(logged["logps/chosen"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_simpo_and_orpo(kind: str, policy: Path, cli, tmp_path: Path):
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    data, tokenizer, settings = parts(policy, tmp_path, kind)
    tokenizer.bos_token = None  # which this trainer, unlike DPO's, would put before prompts
    options = CPOConfig(**settings, loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=1.0, disable_dropout=True)
    network = AutoModelForCausalLM.from_pretrained(policy)
    trainer = CPOTrainer(network, options, train_dataset=data, processing_class=tokenizer)
    batch = trl_batch(trainer)
    loss, logged = trainer.get_batch_loss_metrics(trainer.model, batch)
    loss.backward()
    assert_gradients_equal(trainer.model, cli, tmp_path, policy, kind, "--model.objective", "SimPO")
    trainer.model.zero_grad()
    chosen, rejected = trainer.concatenated_forward(trainer.model, batch)[:2]
    ours = our_metrics(cli, tmp_path, policy, kind, "--model.objective", "SimPO")
    shown = f"SimPO, {kind}: TRL {loss.item():.8f}, here {ours['loss']:.8f}; "
    assert ours["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert ours["margin"] == pytest.approx(float(logged["rewards/margins"]), abs=1e-5)
    trainer.beta = 0.1
    odds = -ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0].mean()
    (odds - chosen.mean()).backward()
    assert_gradients_equal(trainer.model, cli, tmp_path, policy, kind, "--model.objective", "ORPO")
    ours = our_metrics(cli, tmp_path, policy, kind, "--model.objective", "ORPO")
    print(f"{shown}ORPO: TRL {(odds - chosen.mean()).item():.8f}, here {ours['loss']:.8f}")
    assert ours["loss"] == pytest.approx((odds - chosen.mean()).item(), abs=1e-5)
