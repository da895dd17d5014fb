"""The fused distillation loss: the same numbers as the plain one, from the same logits as the own loss."""

from dataclasses import replace

import pytest
import torch
from test_losses import N, V, Watch, assert_close, example, with_gradients
from torch.nn.functional import cross_entropy, kl_div

from lm_lightning import losses
from lm_lightning.compression.distilling import Teacher, kd_loss
from lm_lightning.losses import linear_cross_entropy, linear_losses


def teacher_of(rows=N, width=5, vocabulary=V, bias=True, share=0.3, temperature=1.7):
    """Another head and what goes into it."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, width, generator=generator) for n in (rows, vocabulary))
    return Teacher(hidden, weight, torch.randn(vocabulary, generator=generator) if bias else None, share, temperature)


def plain_distillation(hidden, weight, bias, targets, teacher):
    """The loss and the divergence from all the logits of both at once; of as many tokens."""
    present = targets != -100
    logits, told = (
        (h @ w.T + (0 if b is None else b))[present]
        for h, w, b in ((hidden, weight, bias), (teacher.hidden, teacher.weight, teacher.bias))
    )
    t = teacher.temperature
    apart = t**2 * kl_div((logits / t).log_softmax(1), (told / t).softmax(1), reduction="sum")
    own = cross_entropy(logits, targets[present], reduction="sum")
    return (1 - teacher.share) * own + teacher.share * apart, apart


@pytest.mark.parametrize("chunk, part", [(1, 1), (4, 3), (N, 5), (N, N)])
@pytest.mark.parametrize("bias", [True, False])
def test_distillation_and_its_gradients_are_those_of_all_the_logits(monkeypatch, chunk, part, bias):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", chunk * V)
    monkeypatch.setattr(losses, "SLICE_LOGITS", part * V)
    *head, targets = example(bias=bias, missing=(0, 1, 2, 3, 7))
    teacher = teacher_of(bias=bias)
    loss, apart = linear_losses(*head, targets, second=teacher)
    expected, expected_apart = plain_distillation(*head, targets, teacher)
    assert not apart.requires_grad
    assert_close([apart], [expected_apart.detach()])
    assert_close(with_gradients(loss, *head), with_gradients(expected, *head))


@pytest.mark.parametrize("rows", [V, 15, 18])
def test_padded_rows_of_both_heads_are_left_out_of_the_distillation(rows):
    hidden, weight, bias, targets = example(vocab_size=15)
    teacher = teacher_of(vocabulary=rows)
    cut = replace(teacher, weight=teacher.weight[:15], bias=teacher.bias[:15])
    loss = linear_losses(hidden, weight, bias, targets, 15, teacher)[0]
    expected = plain_distillation(hidden, weight[:15], bias[:15], targets, cut)[0]
    assert_close(with_gradients(loss, hidden, weight, bias), with_gradients(expected, hidden, weight, bias))


def test_distillation_without_share_is_the_plain_loss_bit_for_bit():
    hidden, weight, bias, targets = example()
    loss = linear_losses(hidden, weight, bias, targets, second=teacher_of(share=0.0))[0]
    expected = with_gradients(linear_cross_entropy(hidden, weight, bias, targets), hidden, weight, bias)
    assert all(map(torch.equal, with_gradients(loss, hidden, weight, bias), expected))


def test_distillation_under_autocast_sums_in_float32():
    hidden, weight, bias, targets = example(rows=500)
    teacher = teacher_of(rows=500)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_losses(hidden, weight, bias, targets, second=teacher)[0]
    assert loss.dtype == torch.float32
    expected = plain_distillation(hidden, weight, bias, targets, teacher)[0]
    fused = with_gradients(loss, hidden, weight, bias)
    assert_close(fused, with_gradients(expected, hidden, weight, bias), tolerance=1e-2)


def test_distillation_computes_the_logits_of_both_once():
    """They and two gradients are the only matrix products."""
    hidden, weight, bias, targets = example()
    with Watch() as watch:
        linear_losses(hidden, weight, bias, targets, second=teacher_of())[0].backward()
    assert watch.products == 4


def test_teacher_of_what_cannot_be_moves_nothing_there():
    """Also at a temperature that makes the lowest number infinite."""
    lowest = torch.finfo(torch.float32).min
    logits = torch.tensor([[1.0, 2.0, lowest]], requires_grad=True)
    apart = kd_loss(logits, torch.tensor([[2.0, 0.0, lowest]]), temperature=0.5)
    assert apart.item() == pytest.approx(kd_loss(logits[:, :2], torch.tensor([[2.0, 0.0]]), 0.5).item())
    apart.sum().backward()
    assert logits.grad[0, 2] == 0 and logits.grad.isfinite().all()
