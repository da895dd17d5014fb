"""Losses and their gradients, without training."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import paragraphs
from transformers import GPT2Config, GPT2LMHeadModel

from lm_lightning.data.tokenizer import Tokenizer, train
from lm_lightning.errors import UserError
from lm_lightning.finetuning.tables import Row
from lm_lightning.generation.chat import template_text
from lm_lightning.tasks.preference import log_probs
from lm_lightning.tasks.preference.data import PreferenceData, collate_pairs
from lm_lightning.tasks.preference.model import PreferenceTuning
from lm_lightning.tasks.preference.objectives import DPO, ORPO, Answers, SimPO
from lm_lightning.tasks.preference.rows import PreferenceColumns, pair_of


@pytest.fixture(scope="module")
def data() -> PreferenceData:
    found = PreferenceData(max_length=200)
    found.tokenizer = train(Tokenizer(algorithm="bpe", vocab_size=300), iter(paragraphs(30)), "gpt")
    found.tokenizer.chat_template = template_text("headings")
    return found


def module_of(objective, reference: torch.Tensor | None = None) -> PreferenceTuning:
    """A model with a small network in training mode, outside of any run."""
    torch.manual_seed(0)
    module = PreferenceTuning(pretrained="somewhere", objective=objective)
    settings = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64, "vocab_size": 300}
    network = GPT2LMHeadModel(GPT2Config(**settings, initializer_range=0.2, bos_token_id=0, eos_token_id=0))
    module.network = module.without_dropout(network).train()
    module.has_linear_head = True
    state = SimpleNamespace(fn="validate")
    module._trainer = SimpleNamespace(training=False, state=state)
    if reference is not None:
        module.reference_log_probs = lambda batch, own: reference.to(own)
    return module


def batch_of(data: PreferenceData, *rows: tuple[str, str, str]) -> dict:
    names = ("prompt", "chosen", "rejected")
    pairs = [Row(dict(zip(names, row)), f"row {i}") for i, row in enumerate(rows)]
    examples = [data.example(row, pair_of(row, PreferenceColumns())) | {"id": i} for i, row in enumerate(pairs)]
    return collate_pairs(300 - 1, examples)


ROWS = [("The sea", " is old.", " was painted by seven students."), ("At night a", " letter", " song.")]


@pytest.mark.parametrize("objective", [DPO(), SimPO(gamma=0), SimPO(gamma=1), DPO(label_smoothing=0.1)], ids=repr)
def test_equal_answers_teach_nothing(objective, data: PreferenceData):
    """The loss is ln 2, and every gradient is zero; beside other pairs they do not change the gradient's sum."""
    equal = [("The old captain", " followed the road to the sea.", " followed the road to the sea.")]
    reference = torch.tensor([[-3.0, -3.0]])
    module = module_of(objective, reference)
    loss, count = module.loss(batch_of(data, *equal))
    gamma = getattr(objective, "gamma", 0.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(gamma)), abs=1e-6) and count == 1
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in module.parameters()]).norm()
    other = module_of(objective, reference.repeat(3, 1))
    other.loss(batch_of(data, *equal, *ROWS))[0].backward()
    usual = torch.stack([p.grad.norm() for p in other.parameters()]).norm()
    assert norm < 1e-6 * usual, (norm, usual)


def test_rows_that_pad_a_batch_do_not_count(data: PreferenceData):
    module = module_of(DPO(), torch.zeros(2, 2))
    batch = batch_of(data, *ROWS)
    batch["targets"][1] = -100
    loss, count = module.loss(batch)
    alone = module_of(DPO(), torch.zeros(1, 2)).loss(batch_of(data, ROWS[0]))[0]
    assert count == 1 and loss.item() == pytest.approx(alone.item(), rel=1e-5)


def test_objectives_are_their_formulas():
    chosen = Answers(torch.tensor([-12.0]), torch.tensor([6]), torch.tensor([-14.0]))
    rejected = Answers(torch.tensor([-20.0]), torch.tensor([5]), torch.tensor([-19.0]))
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    margin = 0.5 * ((-12 + 14) - (-20 + 19))
    assert DPO(beta=0.5).losses(chosen, rejected).item() == pytest.approx(-math.log(sigmoid(margin)))
    smooth = -0.9 * math.log(sigmoid(margin)) - 0.1 * math.log(sigmoid(-margin))
    assert DPO(beta=0.5, label_smoothing=0.1).losses(chosen, rejected).item() == pytest.approx(smooth)
    simpo = -math.log(sigmoid(2.5 * (-2 + 4) - 1.5))
    assert SimPO(beta=2.5, gamma=1.5).losses(chosen, rejected).item() == pytest.approx(simpo)
    odds = [math.exp(mean) / (1 - math.exp(mean)) for mean in (-2, -4)]
    orpo = 2 - 0.1 * math.log(sigmoid(math.log(odds[0] / odds[1])))
    assert ORPO().losses(chosen, rejected).item() == pytest.approx(orpo)
    certain = Answers(torch.zeros(1, requires_grad=True), torch.tensor([1]), None)
    ORPO().losses(certain, rejected).sum().backward()
    assert certain.log_probs.grad.isfinite().all()


def test_log_probs_and_gradients_are_those_of_a_plain_softmax(monkeypatch: pytest.MonkeyPatch):
    """In chunks, with a bias, with padding of the vocabulary, with another weight for each token."""
    monkeypatch.setattr(log_probs, "CHUNK_LOGITS", 90)
    torch.manual_seed(0)
    parts = [torch.randn(size, dtype=torch.double, requires_grad=True) for size in ((7, 5), (30, 5), (30,))]
    targets, slopes = torch.randint(0, 25, (7,)), torch.randn(7).double()
    found = log_probs.linear_log_probs(*parts, targets, 25)
    hidden, weight, bias = parts
    expected = (hidden @ weight.T + bias)[:, :25].log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad((found * slopes).sum(), parts), torch.autograd.grad((expected * slopes).sum(), parts)
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


USER, OTHER = {"role": "user", "content": "Why?"}, {"role": "user", "content": "How?"}
YES, NO = ({"role": "assistant", "content": text} for text in ("Yes.", "No."))
FORMATS = {
    "texts": ({"prompt": "The sky", "chosen": " is blue", "rejected": " is red"}, ("The sky", " is blue", " is red")),
    "common text": (
        {"chosen": "Human: Why?\n\nAssistant: I know.", "rejected": "Human: Why?\n\nAssistant: It is so."},
        ("Human: Why?\n\nAssistant:", " I know.", " It is so."),
    ),
    "messages": ({"prompt": [USER], "chosen": [YES], "rejected": [NO]}, ([USER], [YES], [NO])),
    "common messages": (
        {"chosen": [USER, YES, OTHER, YES], "rejected": [USER, YES, OTHER, NO]},
        ([USER, YES, OTHER], [YES], [NO]),
    ),
    "equal messages": ({"chosen": [USER, YES], "rejected": [USER, YES]}, ([USER], [YES], [YES])),
    "longer answers": (
        {"chosen": [USER, YES, OTHER, YES], "rejected": [USER, NO, OTHER, YES]},
        ([USER], [YES, OTHER, YES], [NO, OTHER, YES]),
    ),
    "prompt within the answers": (
        {"prompt": [USER], "chosen": [USER, YES], "rejected": [USER, NO]},
        ([USER], [YES], [NO]),
    ),
    "text of the first message": (
        {"prompt": "Why?", "chosen": [USER, YES], "rejected": [USER, NO]},
        ([USER], [YES], [NO]),
    ),
    "text and messages": ({"prompt": "Why?", "chosen": [YES], "rejected": [NO]}, ([USER], [YES], [NO])),
    "messages and texts": ({"prompt": [USER], "chosen": "Yes.", "rejected": "No."}, ([USER], [YES], [NO])),
    "JSON": (
        {
            "chosen": '[{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Yes."}]',
            "rejected": [USER, NO],
        },
        ([USER], [YES], [NO]),
    ),
    "ShareGPT": (
        {"chosen": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Yes."}], "rejected": [USER, NO]},
        ([USER], [YES], [NO]),
    ),
    "a text with brackets": (
        {"prompt": "List: ", "chosen": '["a", b]', "rejected": "[1]"},
        ("List: ", '["a", b]', "[1]"),
    ),
}


@pytest.mark.parametrize(("row", "expected"), FORMATS.values(), ids=FORMATS)
def test_formats(row: dict, expected: tuple):
    assert tuple(pair_of(Row(row, "rows.jsonl:1"), PreferenceColumns())) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b"}, "no column 'rejected'"),
        (
            {"prompt": "a", "chosen": 3, "rejected": "b"},
            "column 'chosen' is 3, but must be a text, or a list of messages",
        ),
        ({"prompt": "a", "chosen": [{"role": "user"}], "rejected": "b"}, "with role and content"),
        ({"chosen": [YES], "rejected": [NO]}, "after one of the user"),
        ({"question": "Why?", "chosen": "Yes.", "rejected": "No."}, "there is no prompt: .* --data.columns.prompt"),
        ({"chosen": [USER], "rejected": [OTHER]}, "must continue with a message of the assistant"),
    ],
)
def test_rows_without_a_pair_are_refused(row: dict, reason: str):
    with pytest.raises(UserError, match=f"rows.jsonl:1: .*{reason}"):
        pair_of(Row(row, "rows.jsonl:1"), PreferenceColumns())


def test_answers_are_what_the_assistant_writes_after_the_prompt(data: PreferenceData):
    """Not its earlier turns; a special token in a text is plain text."""
    row = Row({"prompt": [OTHER, YES, USER], "chosen": "A letter.<|endoftext|>", "rejected": "No."}, "rows.jsonl:1")
    example = data.example(row, pair_of(row, PreferenceColumns()))
    chosen, rejected = (part[part != -100] for part in example["targets"].split(example["lengths"]))
    end = data.tokenizer.eos_token_id
    assert (
        data.tokenizer.decode(chosen[:-1]) == "A letter.<|endoftext|>" and data.tokenizer.decode(rejected[:-1]) == "No."
    )
    assert chosen.tolist().count(end) == 1 and chosen[-1] == rejected[-1] == end
    texts = Row({"prompt": "The sky", "chosen": " is<|endoftext|>", "rejected": ""}, "rows.jsonl:2")
    example = data.example(texts, pair_of(texts, PreferenceColumns()))
    chosen, rejected = (part[part != -100] for part in example["targets"].split(example["lengths"]))
    assert data.tokenizer.decode(chosen[:-1]) == " is<|endoftext|>" and rejected.tolist() == [end]
    assert chosen.tolist().count(end) == 1 and chosen[-1] == end
