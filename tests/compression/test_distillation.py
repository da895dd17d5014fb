"""Distillation: losses and gradients of the plain formula, the teacher nowhere else, and students nearer to it."""

import copy
import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import needs, optional, paragraphs
from processes import Runs
from safetensors.torch import load_file

from lm_lightning.compression.callbacks.distillation import Distillation
from lm_lightning.data.tokenizer import Tokenizer, train
from lm_lightning.errors import UserError
from lm_lightning.models.gpt import CausalLM

OFF = [f"--model.network.{name}_pdrop=0" for name in ("resid", "embd", "attn")]
LABELS = ["bad", "good", "mixed"]
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_head": 2, "n_positions": 64, "n_layer": 1}
CAPPED = {
    **{"model_type": "gemma2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "final_logit_softcapping": 2.0},
}
BERT = {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
BERT |= {"num_hidden_layers": 1, "max_position_embeddings": 64}
WEIGHT, TEMPERATURE = 0.3, 1.7


def options(teacher: object, **values: object) -> list[str]:
    values = {"teacher": teacher, **values}
    return ["--trainer.callbacks+=Distillation", *(f"--trainer.callbacks.{name}={v}" for name, v in values.items())]


def logged(run: Path, *names: str) -> list[list[float]]:
    with open(run / "metrics.csv", newline="") as file:
        return [[float(row[name]) for name in names] for row in csv.DictReader(file) if row[names[-1]]]


def exported(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def same(first: Path, second: Path) -> bool:
    a, b = exported(first), exported(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# The formula, of transformers' own logits


@pytest.fixture(scope="module")
def tokenizer():
    return train(Tokenizer(algorithm="wordpiece", vocab_size=150), iter(paragraphs(100)), "bert")


def folder_of(auto, network: dict, path: Path, tokenizer, **settings: object) -> Path:
    """A teacher with large weights, so that it is sure of what it says."""
    settings = {key: value for key, value in network.items() if key != "model_type"} | settings
    config = transformers.AutoConfig.for_model(network["model_type"], **{"vocab_size": len(tokenizer), **settings})
    torch.manual_seed(1)
    teacher = auto.from_config(config)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    teacher.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def distilled(model, teacher: Path, tokenizer, **data: object):
    """A model without dropout as if in a fit with the callback, a copy of its network, and that of the teacher."""
    data = {"tokenizer": tokenizer, "block_size": 16, "length_option": "block_size", "labels": LABELS} | data
    model._trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        datamodule=SimpleNamespace(**data),
        **{"is_global_zero": True, "progress_bar_callback": None, "state": SimpleNamespace(fn="fit")},
    )
    model.unigram_start = False
    torch.manual_seed(0)
    model.configure_model()
    callback = Distillation(str(teacher), WEIGHT, TEMPERATURE)
    callback.on_fit_start(model._trainer, model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    return model, copy.deepcopy(model.network), model.auto_class.from_pretrained(teacher).eval(), callback


def kl(logits: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
    """T^2 * KL of rows of logits, summed up, in float64."""
    log_p, p = (logits.double() / TEMPERATURE).log_softmax(-1), (told.double() / TEMPERATURE).softmax(-1)
    return TEMPERATURE**2 * F.kl_div(log_p, p, reduction="sum")


def assert_same(model, batch: dict, reference, own: torch.Tensor, divergence: torch.Tensor, callback) -> None:
    """Compares loss and gradients with (1 - weight) * own + weight * divergence of the copied network."""
    loss, _ = model.training_loss(batch)
    expected = (1 - WEIGHT) * own + WEIGHT * divergence
    assert divergence > 0.02 * own, "there is little to learn from this teacher"
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert callback.distance.item() == pytest.approx(divergence.item(), rel=1e-5)
    scale = 1 / expected.item()  # as a mean of about 1
    (loss * scale).backward()
    (expected * scale).backward()
    for (name, ours), theirs in zip(model.network.named_parameters(), reference.parameters()):
        if theirs.grad is None:
            assert ours.grad is None or not ours.grad.any(), name
        else:
            assert torch.allclose(ours.grad, theirs.grad, atol=1e-5), name


@pytest.mark.parametrize(
    ("student", "teacher", "rows"),
    [(GPT2, GPT2 | {"n_embd": 64}, 150), (GPT2, GPT2, 192), (CAPPED, GPT2, 150), (GPT2, CAPPED, 192)],
    ids=["wide", "more_rows", "capped", "capped_teacher"],
)
def test_loss_of_a_causal_model_is_the_formula(student, teacher, rows, tokenizer, tmp_path: Path):
    auto = transformers.AutoModelForCausalLM
    size = len(tokenizer)
    folder_of(auto, teacher, tmp_path, tokenizer, vocab_size=size + rows - 150)
    model, reference, other, callback = distilled(CausalLM(network=student), tmp_path, tokenizer)
    tokens = torch.randint(5, size, (3, 17), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens[:, :-1], "targets": tokens[:, 1:].clone()}
    batch["targets"][0, :9] = -100
    chosen = batch["targets"] != -100
    logits = reference(batch["input_ids"]).logits[chosen][:, :size]
    with torch.no_grad():
        told = other(batch["input_ids"]).logits[chosen][:, :size]
    own = F.cross_entropy(logits, batch["targets"][chosen], reduction="sum")
    assert_same(model, batch, reference, own, kl(logits, told), callback)
    assert model.loss(batch)[1] == chosen.sum()
    with torch.no_grad():  # evaluation does not know the teacher
        assert model.eval().loss(batch)[0].item() == pytest.approx(own.item(), rel=1e-5)


@needs("tasks.masked_lm")
@pytest.mark.parametrize("pairs", [False, True])
def test_loss_of_a_masked_model_is_the_formula_at_the_masks(pairs: bool, tokenizer, tmp_path: Path):
    auto = transformers.AutoModelForPreTraining if pairs else transformers.AutoModelForMaskedLM
    folder_of(auto, BERT | {"hidden_size": 48}, tmp_path, tokenizer)
    model, reference, other, callback = distilled(
        optional("tasks.masked_lm.model.MaskedLM")(network=BERT), tmp_path, tokenizer, next_sentence=pairs
    )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, len(tokenizer), (4, 16), generator=generator)
    positions = torch.stack([torch.randperm(15, generator=generator)[:3] + 1 for _ in range(4)])
    inputs = {"input_ids": tokens.scatter(1, positions, tokenizer.mask_token_id)}
    inputs |= {"attention_mask": torch.ones_like(tokens), "token_type_ids": torch.zeros_like(tokens)}
    targets = tokens.gather(1, positions)
    targets[0, 2] = -100
    batch = inputs | {"positions": positions, "targets": targets}
    if pairs:
        batch["next_sentence"] = torch.tensor([0, 1, -100, 0])
    output = reference(**inputs)
    with torch.no_grad():
        told = other(**inputs)
    chosen, name = targets != -100, "prediction_logits" if pairs else "logits"
    rows = torch.arange(4).unsqueeze(1)
    logits, told_logits = (o[name][rows, positions][chosen][:, : len(tokenizer)] for o in (output, told))
    own = F.cross_entropy(logits, targets[chosen], reduction="sum")
    divergence = kl(logits, told_logits)
    if pairs:  # a pair weighs as three masks
        present = batch["next_sentence"] != -100
        first, second = (o.seq_relationship_logits[present] for o in (output, told))
        own = own + 3 * F.cross_entropy(first, batch["next_sentence"][present], reduction="sum")
        divergence = divergence + 3 * kl(first, second)
    assert_same(model, batch, reference, own, divergence, callback)


def inputs_of(tokenizer) -> dict[str, torch.Tensor]:
    tokens = torch.randint(5, len(tokenizer), (4, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


@needs("tasks.classification")
@pytest.mark.parametrize("kind", ["multiclass", "multilabel", "regression"])
def test_loss_of_a_classifier_is_the_formula_of_each_kind(kind: str, tokenizer, tmp_path: Path):
    auto, labels = transformers.AutoModelForSequenceClassification, dict(enumerate(LABELS))
    settings = {"num_labels": 1} if kind == "regression" else {"id2label": labels}
    folder_of(auto, BERT, tmp_path, tokenizer, **settings)
    weighed = {"class_weights": {"good": 2.0}} if kind == "multiclass" else {}
    model, reference, other, callback = distilled(
        optional("tasks.classification.model.Classification")(network=BERT, **weighed), tmp_path, tokenizer, kind=kind
    )
    inputs = inputs_of(tokenizer)
    logits = reference(**inputs).logits[:3]  # the last row is padding
    with torch.no_grad():
        told = other(**inputs).logits[:3]
    if kind == "multiclass":
        targets = torch.tensor([2, 1, 0, -100])
        each = torch.tensor([1.0, 2.0, 1.0])
        own = (each * F.cross_entropy(logits, targets[:3], reduction="none")).sum()
        divergence = sum(weight * kl(a, b) for weight, a, b in zip(each, logits, told))
    elif kind == "multilabel":
        targets = torch.tensor([[1.0, 0, 0], [0, 0, 0], [1, 0, 1], [torch.nan] * 3])
        own = F.binary_cross_entropy_with_logits(logits, targets[:3], reduction="sum") / 3
        p, q = (logits.double() / TEMPERATURE).sigmoid(), (told.double() / TEMPERATURE).sigmoid()
        divergence = (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).sum() * TEMPERATURE**2 / 3
    else:
        targets = torch.tensor([0.5, -1, 2, torch.nan])
        own, divergence = ((logits[:, 0] - other).square().sum() for other in (targets[:3], told[:, 0]))
    assert_same(model, inputs | {"targets": targets, "id": [0, 1, 2, -1]}, reference, own, divergence, callback)
    assert model.loss(inputs | {"targets": targets})[1] == (4 if kind == "multiclass" else 3)


@needs("tasks.tagging")
def test_loss_of_a_tagger_is_the_formula_at_the_first_tokens_of_words(tokenizer, tmp_path: Path):
    auto = transformers.AutoModelForTokenClassification
    folder_of(auto, BERT, tmp_path, tokenizer, id2label=dict(enumerate(LABELS)))
    data = {"marks_spans": False, "kinds": LABELS}
    model, reference, other, callback = distilled(
        optional("tasks.tagging.model.Tagging")(network=BERT), tmp_path, tokenizer, **data
    )
    inputs = inputs_of(tokenizer)
    words = torch.tensor([[1, 2, 4], [1, 3, -1], [1, -100, -100], [1, 2, 3]])  # -1: cut off
    targets = torch.tensor([[0, 2, 1], [1, 1, 1], [2, -100, -100], [-100] * 3])
    places = [(0, 1), (0, 2), (0, 4), (1, 1), (1, 3), (2, 1)]
    logits = torch.stack([reference(**inputs).logits[place] for place in places])
    with torch.no_grad():
        told = torch.stack([other(**inputs).logits[place] for place in places])
    own = F.cross_entropy(logits, torch.tensor([0, 2, 1, 1, 1, 2]), reduction="sum")
    batch = inputs | {"words": words, "targets": targets, "id": [0, 1, 2, -1]}
    assert_same(model, batch, reference, own, kl(logits, told), callback)


@needs("tasks.questions")
def test_loss_of_a_question_answerer_is_the_formula_over_the_context(tokenizer, tmp_path: Path):
    folder_of(transformers.AutoModelForQuestionAnswering, BERT, tmp_path, tokenizer)
    model, reference, other, callback = distilled(
        optional("tasks.questions.model.QuestionAnswering")(network=BERT), tmp_path, tokenizer
    )
    inputs = inputs_of(tokenizer)
    context = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1], [0] * 8])
    targets = torch.tensor([[3, 4], [0, 0], [5, 7], [-100, -100]])
    first, second = reference(**inputs), other(**inputs)
    own = divergence = torch.tensor(0.0)
    for name, column in (("start_logits", 0), ("end_logits", 1)):
        for row in range(3):
            allowed = [0, *context[row].nonzero().flatten().tolist()]
            logits, told = first[name][row, allowed], second[name][row, allowed].detach()
            right = torch.tensor(allowed.index(targets[row, column]))
            own = own + F.cross_entropy(logits, right) / 2
            divergence = divergence + kl(logits, told) / 2
    batch = inputs | {"context": context, "targets": targets, "id": [0, 1, 2, -1]}
    assert_same(model, batch, reference, own, divergence, callback)


# Whole runs


@pytest.mark.slow
def test_shallow_student_comes_back_to_its_teacher_and_one_without_does_not(fit, tmp_path: Path):
    brief = ("--trainer.limit_val_batches", 0)
    teacher = fit("--model.network.n_layer", 3, "--trainer.max_steps", 80, *brief)
    shallow = transformers.AutoModelForCausalLM.from_pretrained(teacher / "model")
    shallow.transformer.h, shallow.config.n_layer = shallow.transformer.h[:1], 1
    shallow.save_pretrained(tmp_path / "shallow")
    student = ("--model.network", "null", "--model.pretrained", tmp_path / "shallow", "--trainer.max_steps", 30, *brief)
    alone, taught = fit(*student), fit(*student, *options(teacher, weight=0.9))
    networks = [transformers.AutoModelForCausalLM.from_pretrained(run / "model") for run in (teacher, alone, taught)]
    ids = transformers.AutoTokenizer.from_pretrained(teacher / "tokenizer")("\n\n".join(paragraphs(20, seed=1)))
    blocks = torch.tensor(ids["input_ids"][: 32 * 30]).view(30, 32)
    with torch.no_grad():
        told, *own = (network(blocks).logits for network in (*networks, shallow))
    without, near, before = ((kl(logits, told) / blocks.numel()).item() for logits in own)
    assert near < 0.7 * min(before, without), (near, before, without)
    steps = [distance for (distance,) in logged(taught, "train/distillation")]
    assert len(steps) == 30 and sum(steps[-5:]) < 0.7 * sum(steps[:5])


@pytest.mark.slow
def test_teacher_without_weight_changes_no_bit_and_is_in_no_file(fit):
    teacher = fit("--model.network.n_embd", 64, "--trainer.max_steps", 4)
    plain, taught = fit(), fit(*options(teacher, weight=0))  # with dropout, of the student alone
    assert same(plain, taught)
    names = ("train/loss", "train/gradient_norm")
    assert logged(plain, *names) == logged(taught, *names)
    assert logged(plain, "val/loss") == logged(taught, "val/loss")
    first, second = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (plain, taught))
    assert first["state_dict"].keys() == second["state_dict"].keys()
    assert first["callbacks"].keys() == second["callbacks"].keys()


@pytest.mark.slow
def test_resumed_run_ends_in_the_same_bits(fit, recipe: Path):
    flags = options(fit("--trainer.max_steps", 4))
    whole = fit(*flags, "--name", "whole")
    stop = ("--trainer.callbacks+=test_fit.Stop", "--trainer.callbacks.step", 7)
    with pytest.raises(RuntimeError, match="power failure"):
        fit(*flags, *stop, "--name", "part")
    assert same(whole, fit(*flags, "--name", "part", "--ckpt_path", "last"))


@needs("sharding")
@pytest.mark.slow
def test_micro_batches_and_processes_do_what_one_does(fit, recipe: Path, tmp_path: Path):
    short = (*OFF, "--trainer.max_steps", 4, "--trainer.limit_val_batches", 0)
    flags = (*short, *options(fit("--model.network.n_embd", 64, *short)))
    runs = Runs(tmp_path / "parallel")
    runs.folder.mkdir()
    two = ("fit", "--config", recipe, *flags, "--trainer.devices", 2)
    runs(
        {
            "ddp": (*two, "--trainer.strategy", "ddp", "--data.batch_size", 2),
            "fsdp2": (*two, "--trainer.strategy", "fsdp2", "--data.batch_size", 2),
            "tp": (*two, "--trainer.strategy", "tp"),
        }
    )
    one, accumulated = fit(*flags), fit(*flags, "--data.batch_size", 2, "--trainer.accumulate_grad_batches", 2)
    names = ("step", "train/loss", "train/gradient_norm", "train/distillation")
    expected = logged(one, *names)
    assert len(expected) == 4
    for run in (accumulated, runs.folder / "ddp", runs.folder / "fsdp2"):
        assert not runs.error(run.name), runs.error(run.name)
        for own, right in zip(logged(run, *names), expected, strict=True):
            assert own == pytest.approx(right, abs=2e-5), run.name
    assert "full head in each process: use --trainer.strategy fsdp2" in runs.error("tp")


# Refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"teacher": "x", "weight": 1.5}, "weight is 1.5, but must be between 0 and 1"),
        ({"teacher": "x", "temperature": 0}, "temperature is 0.0, but must be"),
        ({"teacher": "missing/folder/x"}, "the folder 'missing/folder/x' does not exist"),
        ({"weight": 0.5}, "teacher"),
        ({"teacher": "null"}, "teacher"),
    ],
)
def test_impossible_settings_are_refused(fit, flags: dict, message: str):
    flags = [f"--trainer.callbacks.{name}={value}" for name, value in flags.items()]
    with pytest.raises((UserError, SystemExit), match=message):
        fit("--trainer.callbacks+=Distillation", *flags)


def test_teacher_with_another_tokenizer_is_refused(fit):
    teacher = fit("--data.tokenizer.vocab_size", 290, "--trainer.max_steps", 3)
    with pytest.raises(UserError, match="was not trained with the data's tokenizer"):
        fit(*options(teacher))
    for file in (teacher / "model").glob("tokenizer*"):  # weights alone may still have too few rows
        file.unlink()
    with pytest.raises(UserError, match="has no weights for 10 tokens of the data's tokenizer"):
        fit(*options(teacher))


@needs("tasks.classification")
def test_teacher_of_other_labels_or_none_is_refused(tokenizer, tmp_path: Path):
    classification = optional("tasks.classification.model.Classification")
    auto = transformers.AutoModelForSequenceClassification
    folder_of(auto, BERT, tmp_path / "order", tokenizer, id2label=dict(enumerate(reversed(LABELS))))
    folder_of(transformers.AutoModelForMaskedLM, BERT, tmp_path / "none", tokenizer)
    with pytest.raises(UserError, match="predicts the labels mixed, good, bad, but the data has bad, good, mixed"):
        distilled(classification(network=BERT), tmp_path / "order", tokenizer, kind="multiclass")
    with pytest.raises(
        UserError, match="has no weights for .*classifier.weight.*: use a teacher that was trained for this task"
    ):
        distilled(classification(network=BERT), tmp_path / "none", tokenizer, kind="multiclass")


@needs("tasks.parsing")
def test_models_that_it_does_not_know_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="Parser does not support distillation"):
        Distillation(str(tmp_path)).on_fit_start(
            SimpleNamespace(strategy=None), optional("tasks.parsing.model.Parser")(network=BERT)
        )
