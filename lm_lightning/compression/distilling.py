"""Distillation losses: the divergence of a student's predictions from its teacher's, combined with its own loss."""

from dataclasses import dataclass, replace
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from lm_lightning.losses import cross_entropy, linear_losses


@dataclass
class Distiller:
    """Computes the distillation losses for `LanguageModule.distillation_loss`.

    Args:
        weight: Weight of the distillation loss; the weight of the model's own loss is 1 - weight.
        temperature: Divisor of the logits of both models.
    """

    weight: float
    temperature: float

    def mix(self, own: Tensor, distillation: Tensor) -> Tensor:
        """The weighted mean of a model's own loss and its distillation loss."""
        return (1 - self.weight) * own + self.weight * distillation

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The distillation loss of logits, (..., V) float, against the teacher's: (...) float32, see `kd_loss`."""
        return kd_loss(student, teacher, self.temperature)

    def token_losses(
        self, student: Any, output: Tensor, teacher: Any, teacher_output: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Losses of a model that predicts tokens, with a teacher that also does.

        Args:
            student: The model, with `has_linear_head`, `vocab_size` and `network`.
            output: The inputs of its head if it `has_linear_head`, (N, H) float, otherwise its logits, (N, V) float.
            teacher: The teacher.
            teacher_output: The teacher's output for the same tokens, without gradients.
            targets: (N,) int64, -100 for missing ones.

        Returns:
            The loss, and the distillation loss as a part of it, summed over the targets, () float32 each.
        """
        head, teacher_head = student.network.get_output_embeddings(), teacher.network.get_output_embeddings()
        if student.has_linear_head and teacher.has_linear_head:
            other = Teacher(teacher_output, teacher_head.weight, teacher_head.bias, self.weight, self.temperature)
            return linear_losses(output, head.weight, head.bias, targets, student.vocab_size, other)
        logits = head(output) if student.has_linear_head else output
        with torch.no_grad():
            teacher_logits = teacher_head(teacher_output) if teacher.has_linear_head else teacher_output
        rows = min(student.vocab_size, teacher.vocab_size)
        losses = self.divergence(logits[:, :rows], teacher_logits[:, :rows])
        distillation = losses.masked_fill(targets == -100, 0).sum()
        return self.mix(cross_entropy(logits[:, : student.vocab_size], targets), distillation), distillation


@dataclass
class Teacher:
    """The linear head of a teacher network and its inputs, as the `SecondLoss` of its student.

    Args:
        hidden: The teacher's last hidden states of the same tokens, (N, H') float, without gradients.
        weight: Weight of the teacher's head, (V', H') float; its first rows are for the same tokens as the student's.
        bias: Bias of the teacher's head, (V',) float, or None.
        share: Weight of `kd_loss`; the weight of the cross entropy is 1 - share.
        temperature: Divisor of the logits of both.
    """

    hidden: Tensor
    weight: Tensor
    bias: Optional[Tensor]
    share: float
    temperature: float

    def prepared(self, dtype: torch.dtype, vocab_size: int) -> "Teacher":  # noqa: D102 (as in SecondLoss)
        rows = min(vocab_size, len(self.weight))  # tokens that both have
        bias = None if self.bias is None else self.bias[:rows]
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight[:rows].to(dtype), bias=bias)

    def inputs(self, start: int, stop: int) -> Tensor:  # noqa: D102
        return self.hidden[start:stop] @ self.weight.T

    def losses(self, logits: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        inputs = inputs if self.bias is None else inputs + self.bias
        both = (logits[:, : inputs.shape[1]], inputs)
        log_p, log_q = (torch.log_softmax(each.float() / self.temperature, dim=1) for each in both)
        q = log_q.exp()
        apart = self.temperature**2 * (q * (log_q - log_p)).sum(1, keepdim=True)
        return apart, log_p.exp_().sub_(q).mul_(self.temperature)


def kd_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The distillation loss of a student's logits against a teacher's (Hinton et al., 2015, arXiv:1503.02531).

    Args:
        student: Logits, (..., V) float.
        teacher: Logits of the same shape.
        temperature: T, the divisor of both.

    Returns:
        T^2 * KL(teacher || student), (...) float32. The factor T^2 makes the magnitude of the gradients independent of
        the temperature.
    """
    lowest = torch.finfo(torch.float32).min  # masked logits stay finite when divided by a temperature below 1
    log_p, log_q = ((logits.float() / temperature).clamp(min=lowest).log_softmax(-1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
