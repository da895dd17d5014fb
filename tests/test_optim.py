"""Optimizers and schedules: who gets which treatment, and what the learning rate is when."""

import copy
import csv
import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import command, needs, refusal
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

from lm_lightning.errors import UserError
from lm_lightning.models.steps import schedule_steps
from lm_lightning.optim import MuonAdamW, Schedule, make_optimizer, parameter_groups

# Schedules

FALLING = ["cosine", "linear", "wsd"]
CASES = [  # 4 steps of warm-up
    # 13 steps: 0 1 2 3 | 4 ... 12
    ("cosine", 13, {0: 0.2, 3: 0.8, 4: 1.0, 6: 0.1 + 0.9 * (2 + math.sqrt(2)) / 4, 8: 0.55, 12: 0.1, 13: 0.1, 99: 0.1}),
    ("linear", 13, {0: 0.2, 3: 0.8, 4: 1.0, 6: 0.775, 8: 0.55, 12: 0.1, 13: 0.1, 99: 0.1}),
    ("constant", 13, {0: 0.2, 3: 0.8, 4: 1.0, 8: 1.0, 12: 1.0, 13: 1.0, 99: 1.0}),
    ("constant", math.inf, {0: 0.2, 3: 0.8, 4: 1.0, 10**9: 1.0}),
    # 20 steps, the last 5 of which fall: 0 1 2 3 | 4 ... 14 | 15 16 17 18 19
    ("wsd", 20, {0: 0.2, 3: 0.8, 4: 1.0, 14: 1.0, 15: 0.82, 16: 0.64, 18: 0.28, 19: 0.1, 20: 0.1, 99: 0.1}),
]


@pytest.mark.parametrize("shape, total_steps, factors", CASES)
def test_factors_of_a_schedule(shape, total_steps, factors):
    schedule = Schedule(shape, warmup_steps=4, min_lr_ratio=0.1, decay_ratio=0.25)
    assert {step: schedule.factor(step, total_steps) for step in factors} == pytest.approx(factors)


@pytest.mark.parametrize("shape", FALLING + ["constant"])
def test_without_warm_up_the_first_step_has_the_full_rate(shape):
    assert Schedule(shape, warmup_steps=0).factor(0, 10) == 1.0


@pytest.mark.parametrize("shape", FALLING)
def test_a_final_factor_of_zero_is_reached_only_at_the_last_step(shape):
    schedule = Schedule(shape, warmup_steps=0, min_lr_ratio=0.0, decay_ratio=0.5)
    factors = [schedule.factor(step, 10) for step in range(10)]
    assert factors == sorted(factors, reverse=True)
    assert factors[-1] == pytest.approx(0) and min(factors[:-1]) > 0.01


def test_wsd_of_a_short_run_ends_at_the_final_rate():
    assert Schedule("wsd", warmup_steps=0, min_lr_ratio=0.1, decay_ratio=0.2).factor(4, 5) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "wrong", [{"warmup_steps": -1}, {"warmup_ratio": 5}, {"min_lr_ratio": 1.5}, {"decay_ratio": 20}]
)
def test_a_schedule_out_of_range_is_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(UserError, match=f"model.schedule.{name} is {value}, but must be"):
        Schedule(**wrong).check(100)


def test_the_warm_up_is_a_share_of_the_run_unless_its_steps_are_given():
    schedule = Schedule(warmup_ratio=0.1)
    assert [schedule.warmup(steps) for steps in (5, 20, 400, math.inf)] == [0, 2, 40, 0]
    assert [schedule.factor(step, 20) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert Schedule(warmup_ratio=0.1, warmup_steps=7).warmup(400) == 7
    for steps in (1, 5, 20, 400):
        Schedule().check(steps)
    with pytest.raises(UserError, match="has no end: set trainer.max_steps.* or model.schedule.warmup_steps"):
        Schedule("constant").check(math.inf)


def test_wsd_falls_no_earlier_than_the_warm_up_ends():
    schedule = Schedule("wsd", warmup_steps=8, min_lr_ratio=0.0, decay_ratio=0.5)
    assert [schedule.factor(step, 11) for step in range(7, 11)] == pytest.approx([8 / 9, 1.0, 0.5, 0.0])


@pytest.mark.parametrize("shape", FALLING)
def test_a_falling_schedule_needs_a_run_with_an_end(shape):
    with pytest.raises(UserError, match=f"{shape}.*max_steps"):
        Schedule(shape, warmup_steps=1).check(math.inf)
    Schedule("constant", warmup_steps=1).check(math.inf)


@pytest.mark.parametrize("shape", FALLING + ["constant"])
def test_the_warm_up_must_be_shorter_than_the_run(shape):
    schedule = Schedule(shape, warmup_steps=10)
    for total_steps in (5, 10):
        with pytest.raises(UserError, match=f"10 steps .* {total_steps} steps.*warmup_steps"):
            schedule.check(total_steps)
    schedule.check(11)


# Groups

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 32}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0}
CONFIGS = {
    "gpt2": GPT2Config(**SIZES, **SPECIAL, n_positions=8),
    "llama": LlamaConfig(**SIZES, **SPECIAL, intermediate_size=24, tie_word_embeddings=False, attention_bias=True),
}
OUTSIDE = {
    "gpt2": {"transformer.wte.weight", "transformer.wpe.weight"},  # the head is tied
    "llama": {"model.embed_tokens.weight", "lm_head.weight"},
}


def network(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name])


def names_by_group(model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: [names[id(parameter)] for parameter in group["params"]] for group in parameter_groups(model)}


@pytest.mark.parametrize("name", CONFIGS)
def test_each_parameter_is_in_exactly_one_group(name):
    model = network(name)
    grouped = [parameter for names in names_by_group(model).values() for parameter in names]
    assert sorted(grouped) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_embeddings_and_head_are_not_hidden_matrices(name):
    model = network(name)
    groups, shapes = names_by_group(model), {name: p.ndim for name, p in model.named_parameters()}
    assert set(groups["embeddings"]) == OUTSIDE[name]
    assert {shapes[parameter] for parameter in groups["hidden"]} == {2}
    assert all(".h." in parameter or ".layers." in parameter for parameter in groups["hidden"])
    assert {shapes[parameter] for parameter in groups["vectors"]} == {1}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, MuonAdamW])
def test_matrices_are_decayed_and_vectors_are_not(name, optimizer):
    groups = optimizer(parameter_groups(network(name)), lr=1e-3, weight_decay=0.1).param_groups
    decays = {group["name"]: group["weight_decay"] for group in groups}
    assert decays == {"hidden": 0.1, "embeddings": 0.1, "vectors": 0.0}


def test_frozen_parameters_are_left_out():
    model = network("gpt2")
    model.transformer.wte.requires_grad_(False)
    model.transformer.h[0].requires_grad_(False)
    grouped = sorted(parameter for names in names_by_group(model).values() for parameter in names)
    assert grouped == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert not any("wte" in parameter or ".h.0." in parameter for parameter in grouped)


def test_a_group_without_parameters_is_left_out():
    model = network("gpt2").requires_grad_(False)
    model.transformer.ln_f.requires_grad_(True)
    assert names_by_group(model) == {"vectors": ["transformer.ln_f.weight", "transformer.ln_f.bias"]}


# Muon


def train(model, optimizers, first, last):
    """Takes the optimizer steps [first, last), each with a gradient that depends on the step only."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_equal(actual, expected):
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("steps", [1, 3])
def test_hidden_matrices_get_muon_and_all_else_adamw(name, steps):
    together, apart = network(name), network(name)
    train(together, [MuonAdamW(parameter_groups(together), lr=0.01)], 0, steps)
    hidden, *others = parameter_groups(apart)
    optimizers = [
        torch.optim.Muon(hidden["params"], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8),
    ]
    train(apart, optimizers, 0, steps)
    assert_equal(weights(together), weights(apart))


def test_settings_reach_the_optimizer_they_are_for():
    settings = {"lr": 0.02, "weight_decay": 0.3, "momentum": 0.8, "betas": (0.7, 0.75), "eps": 1e-3}
    hidden, *others = MuonAdamW(parameter_groups(network("gpt2")), **settings).param_groups
    assert hidden["momentum"] == 0.8 and "betas" not in hidden
    assert all(group["betas"] == (0.7, 0.75) and group["eps"] == 1e-3 for group in others)
    assert {group["lr"] for group in (hidden, *others)} == {0.02}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_optimizer_goes_on_to_the_bit(name):
    whole = network(name)
    train(whole, [MuonAdamW(parameter_groups(whole), lr=0.01)], 0, 5)

    first = network(name)
    optimizer = MuonAdamW(parameter_groups(first), lr=0.01)
    train(first, [optimizer], 0, 3)
    second = copy.deepcopy(first)
    restored = MuonAdamW(parameter_groups(second), lr=0.5)
    restored.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    train(second, [restored], 3, 5)
    assert_equal(weights(second), weights(whole))


@pytest.mark.parametrize("loaded", [False, True])
def test_a_scheduler_sets_the_learning_rate_of_both(loaded):
    """With a factor of 0 nothing moves any more, neither by Muon nor by AdamW."""
    model = network("gpt2")
    optimizer = MuonAdamW(parameter_groups(model), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [1.0, 0.5, 0.0][step])
    if loaded:
        optimizer.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    rates, moved = [], []
    for step in range(3):
        before = weights(model)
        train(model, [optimizer], step, step + 1)
        rates.append({group["lr"] for group in optimizer.param_groups})
        moved.append([name for name, weight in weights(model).items() if not torch.equal(weight, before[name])])
        if step < 2:
            scheduler.step()
    assert rates == [{0.01}, {0.005}, {0.0}]
    assert len(moved[0]) == len(moved[1]) == len(before) and moved[2] == []


def test_gradients_are_zeroed_through_the_one_optimizer():
    model = network("gpt2")
    optimizer = MuonAdamW(parameter_groups(model))
    train(model, [optimizer], 0, 1)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_network_without_hidden_matrices_to_train_gets_adamw_alone():
    model = network("gpt2").requires_grad_(False)
    model.transformer.wpe.requires_grad_(True)
    before = weights(model)
    optimizer = MuonAdamW(parameter_groups(model))
    model.transformer.wpe.weight.grad = torch.ones_like(model.transformer.wpe.weight)
    optimizer.step()
    after = weights(model)
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["transformer.wpe.weight"]


def test_the_matrices_of_a_mixture_of_experts_get_muon_although_the_experts_are_3d():
    config = MixtralConfig(**SIZES, **SPECIAL, num_key_value_heads=1, intermediate_size=16, num_local_experts=2)
    model = AutoModelForCausalLM.from_config(config)
    optimizer = MuonAdamW(parameter_groups(model))
    train(model, [optimizer], 0, 1)
    assert "momentum_buffer" in optimizer.state[model.model.layers[0].self_attn.q_proj.weight]


# 8 bits, by bitsandbytes

BITS = "bitsandbytes.optim.AdamW8bit"
WIDE = (  # its state of tensors with fewer than 4096 elements stays in 32 bits
    "--model.network",
    json.dumps({"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 64}),
)


def optimizer(name: str, **settings: float) -> list[object]:
    return ["--model.optimizer", name, *(f"--model.optimizer.{key}={value}" for key, value in settings.items())]


def losses(run: Path) -> list[float]:
    with open(run / "metrics.csv", newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


@pytest.mark.slow
def test_8_bit_optimizers_keep_a_quarter_and_train_as_their_own_kind(fit):
    pytest.importorskip("bitsandbytes")
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    whole = fit(*WIDE, *optimizer("torch.optim.AdamW", **settings))
    run = fit(*WIDE, *optimizer(BITS, **settings))
    assert losses(run) == pytest.approx(losses(whole), abs=0.02)
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]
    large = [values["__bnb_optimizer_quant_state__"] for values in saved["state"].values()]
    large = [values for values in large if values["state1"].numel() >= 4096]
    assert len(large) == 10 and all(v[f"state{n}"].dtype == torch.uint8 for v in large for n in (1, 2))
    assert {group["name"]: group["weight_decay"] for group in saved["param_groups"]} == {
        **{"hidden": 0.1, "embeddings": 0.1, "vectors": 0.0}
    }
    with pytest.raises(UserError, match="the checkpoint's optimizer is AdamW8bit, this run's AdamW"):
        fit(*WIDE, "--ckpt_path", "last", "--trainer.max_steps", 12)


@pytest.mark.slow
@pytest.mark.parametrize("name", [BITS, "bitsandbytes.optim.Lion8bit"])
def test_8_bit_optimizers_are_resumed_to_the_bit(fit, name: str):
    pytest.importorskip("bitsandbytes")
    flags = (*WIDE, *optimizer(name, lr=1e-3))
    whole = fit("--name", "whole", *flags)
    with pytest.raises(RuntimeError, match="power failure"):
        fit("--name", "part", *flags, "--trainer.callbacks+=test_fit.Stop", "--trainer.callbacks.step", 7)
    part = fit("--name", "part", *flags, "--ckpt_path", "last")
    states = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (whole, part)]
    assert_equal(states[1]["state_dict"], states[0]["state_dict"])
    moments = [[v["__bnb_optimizer_quant_state__"] for v in s["optimizer_states"][0]["state"].values()] for s in states]
    assert all(torch.equal(a["state1"], b["state1"]) for a, b in zip(*moments))


@needs("sharding")
def test_8_bit_optimizers_are_refused_with_sharded_weights(recipe: Path):
    pytest.importorskip("bitsandbytes")
    flags = (*WIDE, *optimizer(BITS), "--trainer.strategy", "fsdp2", "--trainer.devices", 2)
    message = refusal(command("fit", "--config", recipe, *flags))
    assert "AdamW8bit of bitsandbytes cannot step with sharded weights: use --trainer.strategy ddp" in message


def test_missing_bitsandbytes_is_told_with_its_remedy(fit, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for flags in (optimizer(BITS), ["--model.optimizer.class_path", BITS]):
        with pytest.raises(UserError, match="class of bitsandbytes, which is missing: pip install bitsandbytes$"):
            fit(*flags)


def test_muon_of_matrices_of_equal_shape_is_that_of_torch():
    """The updates and the state of matrices that are updated together are those of one at a time."""
    shapes = [(16, 48), (16, 16), (64, 16), (16, 48), (64, 16), (16, 48)]
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
    expected = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)
    optimizer = MuonAdamW([{"name": "hidden", "params": ours}], **options)
    for step in range(4):
        for i, (a, b) in enumerate(zip(ours, theirs)):
            a.grad = b.grad = None if (i, step) == (3, 1) else torch.randn_like(a)
        if step == 2:  # a state of torch's Muon can be resumed
            state = {**optimizer.state_dict(), "state": copy.deepcopy(expected.state_dict()["state"])}
            optimizer.load_state_dict(state)
        optimizer.step()
        expected.step()
        assert all(a.grad is b.grad for a, b in zip(ours, theirs))
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=0, atol=3e-4)  # a step is 0.01; rounding of bfloat16
    momenta = [
        (optimizer.state[a]["momentum_buffer"], expected.state[b]["momentum_buffer"]) for a, b in zip(ours, theirs)
    ]
    assert all(torch.equal(a, b) for a, b in momenta)


@pytest.mark.parametrize("options, fused", [({}, True), ({"fused": False}, False), ({"foreach": True}, None)])
def test_adamw_is_fused_unless_its_settings_say_otherwise(options, fused):
    model = network("gpt2")

    def factory(groups):
        return torch.optim.AdamW(groups, lr=1e-3, **options)

    optimizer, _ = make_optimizer(model, factory, Schedule(), lambda step: 10)
    assert {group["fused"] for group in optimizer.param_groups} == {fused}
    expected = copy.deepcopy(model)
    plain = torch.optim.AdamW(parameter_groups(expected), lr=1e-3)
    for group, other in zip(optimizer.param_groups, plain.param_groups):
        group["lr"] = other["lr"] = 1e-3
    for _ in range(3):
        for a, b in zip(model.parameters(), expected.parameters()):
            a.grad = b.grad = torch.randn_like(a)
        optimizer.step()
        plain.step()
    for a, b in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_run_with_only_a_time_limit_follows_its_schedule_over_the_time(monkeypatch):
    timer = Timer({"seconds": 100}, verbose=False)
    trainer = Trainer(callbacks=[timer], logger=False, enable_checkpointing=False, accelerator="cpu")
    steps, schedule = schedule_steps(trainer, math.inf), Schedule("linear", warmup_ratio=0.2, min_lr_ratio=0.0)
    schedule.check(steps(0))
    passed = {0: 0.0, 10: 5.0, 11: 10.0, 20: 20.0, 90: 60.0, 100: 99.99, 101: 120.0}  # seconds after so many steps
    factors = []
    for step, seconds in passed.items():
        monkeypatch.setattr(timer, "time_elapsed", lambda *_, seconds=seconds: seconds)
        factors.append(schedule.factor(step, steps(step)))
    assert factors == pytest.approx([0, 0.25, 0.5, 1, 0.5, 0, 0], abs=0.06)
    assert schedule_steps(trainer, 50)(7) == 50  # with a number of steps, time does not matter
