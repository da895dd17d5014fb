"""Distillation losses that several models share."""

from typing import Any

import torch
from torch import Tensor

from lm_lightning.losses import Teacher, cross_entropy, kd_loss, linear_distillation


def mix(own: Tensor, distillation: Tensor, weight: float) -> Tensor:
    """The weighted mean of a model's own loss and its distillation loss; `weight` is that of the latter."""
    return (1 - weight) * own + weight * distillation


def token_losses(
    student: Any,
    output: Tensor,
    teacher: Any,
    teacher_output: Tensor,
    targets: Tensor,
    weight: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Losses of a model that predicts tokens, with a teacher that does.

    Args:
        student: The model, with `has_linear_head`, `vocab_size` and `network`.
        output: The inputs of its head if it `has_linear_head`, (N, H) float, else the logits, (N, V) float.
        teacher: The other model.
        teacher_output: Its output for the same tokens, without gradients.
        targets: (N,) int64, -100 for none.
        weight: See `mix`.
        temperature: See `losses.kd_loss`.

    Returns:
        The loss and the distillation loss in it, summed over the targets, () float32.
    """
    head, teacher_head = student.network.get_output_embeddings(), teacher.network.get_output_embeddings()
    if student.has_linear_head and teacher.has_linear_head:
        other = Teacher(teacher_output, teacher_head.weight, teacher_head.bias, weight, temperature)
        return linear_distillation(output, head.weight, head.bias, targets, other, student.vocab_size)
    logits = head(output) if student.has_linear_head else output
    with torch.no_grad():
        teacher_logits = teacher_head(teacher_output) if teacher.has_linear_head else teacher_output
    rows = min(student.vocab_size, teacher.vocab_size)
    losses = kd_loss(logits[:, :rows], teacher_logits[:, :rows], temperature)
    distillation = losses.masked_fill(targets == -100, 0).sum()
    return mix(cross_entropy(logits[:, : student.vocab_size], targets), distillation, weight), distillation
