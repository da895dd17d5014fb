"""Objectives of preference tuning: log-probabilities of two answers in, losses out."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from lm_lightning.errors import UserError


class Answers(NamedTuple):
    """The answers of a batch, the better ones or the worse ones.

    Attributes:
        log_probs: Sum of the log-probabilities of each answer's tokens, in nats, (B,) float32.
        tokens: Number of tokens of each answer, (B,) int64; 0 for rows that only pad a batch.
        reference: `log_probs` by the reference network; None if the objective needs none.
    """

    log_probs: Tensor
    tokens: Tensor
    reference: Optional[Tensor]

    @property
    def means(self) -> Tensor:
        """The mean log-probability of the tokens of each answer, (B,) float32."""
        return self.log_probs / self.tokens.clamp(min=1)

    @property
    def log_ratios(self) -> Tensor:
        """How much more probable each answer is than by the reference, in nats, (B,) float32."""
        assert self.reference is not None
        return self.log_probs - self.reference


class Objective:
    """Base of all objectives, chosen by `--model.objective CLASS` with its options, such as `--model.objective.beta 1`.

    Attributes:
        needs_reference: Whether answers are compared with those of a reference network.
    """

    needs_reference: ClassVar[bool] = False

    def rewards(self, answers: Answers) -> Tensor:
        """How good the network considers each answer to be, (B,) float32."""
        raise NotImplementedError

    def losses(self, chosen: Answers, rejected: Answers) -> Tensor:
        """The loss of each pair, (B,) float32."""
        raise NotImplementedError


@dataclass
class DPO(Objective):
    """Direct preference optimization (Rafailov et al., 2023, arXiv:2305.18290).

    The reward of an answer is `beta` times the logarithm of how much more probable it is than by the reference network;
    the loss is the binary cross entropy of preferring the better answer; its logit is the difference of the rewards.

    Args:
        beta: Factor of the rewards: the larger it is, the nearer the network stays to the reference.
        label_smoothing: Probability that a label is wrong ("conservative DPO").
    """

    needs_reference: ClassVar[bool] = True

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not self.beta > 0 or not 0 <= self.label_smoothing < 0.5:
            raise UserError(
                f"model.objective has beta {self.beta:g} and label_smoothing {self.label_smoothing:g}, but must have a "
                "beta above 0 and a label_smoothing from 0 to below 0.5"
            )

    def rewards(self, answers: Answers) -> Tensor:
        return self.beta * answers.log_ratios

    def losses(self, chosen: Answers, rejected: Answers) -> Tensor:
        margins = self.rewards(chosen) - self.rewards(rejected)
        return -(1 - self.label_smoothing) * F.logsigmoid(margins) - self.label_smoothing * F.logsigmoid(-margins)


@dataclass
class SimPO(Objective):
    """Simple preference optimization, without a reference network (Meng et al., 2024, arXiv:2405.14734).

    The reward of an answer is `beta` times the mean log-probability of its tokens, and that of the better answer is to
    be larger by `gamma`.

    Args:
        beta: Factor of the rewards.
        gamma: Difference of the rewards at which the loss of a pair is ln 2.
    """

    beta: float = 2.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        if not self.beta > 0 or self.gamma < 0:
            raise UserError(
                f"model.objective has beta {self.beta:g} and gamma {self.gamma:g}, but must have a beta above 0 and a "
                "gamma of 0 or more"
            )

    def rewards(self, answers: Answers) -> Tensor:
        return self.beta * answers.means

    def losses(self, chosen: Answers, rejected: Answers) -> Tensor:
        return -F.logsigmoid(self.rewards(chosen) - self.rewards(rejected) - self.gamma)


@dataclass
class ORPO(Objective):
    """Odds ratio preference optimization, without a reference network (Hong et al., 2024, arXiv:2403.07691).

    The loss of a pair is the mean cross entropy of the tokens of the better answer, plus `beta` times the binary cross
    entropy of preferring it; the logit is the logarithm of the ratio of the answers' odds. The probability of an
    answer is the geometric mean of those of its tokens. (In TRL, the first term is a mean over the tokens of a batch,
    prompts included, so that it depends on how pairs are divided into batches.)

    Args:
        beta: Weight of the second term (lambda in the paper).
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError(f"model.objective has beta {self.beta:g}, but must have a beta above 0")

    def rewards(self, answers: Answers) -> Tensor:
        return self.beta * answers.means

    def losses(self, chosen: Answers, rejected: Answers) -> Tensor:
        ratios = log_odds(chosen.means) - log_odds(rejected.means)
        return -chosen.means - self.beta * F.logsigmoid(ratios)


def log_odds(log_probs: Tensor) -> Tensor:
    """The logarithm of p / (1 - p), of log p."""
    return log_probs - torch.log(-torch.expm1(log_probs.clamp(max=-1e-6)))
