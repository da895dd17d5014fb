"""Settings of generation, which can be checked before a model is loaded."""

import math
from dataclasses import dataclass

from lm_lightning.errors import UserError


@dataclass
class Sampling:
    """How the next token is chosen.

    Args:
        greedy: Whether to always choose the most probable token; the other settings then have no effect.
        temperature: Divisor of the logits: values below 1 sharpen the distribution, values above 1 flatten it.
        top_k: Number of most probable tokens from which to sample; 0 for all.
        top_p: Sample from the smallest set of most probable tokens whose probabilities add up to this value; 1 for all.
        seed: The same seed and prompt give the same text, whatever the other prompts of the batch are.
    """

    greedy: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


def check(prompts: int, max_new_tokens: int, sampling: Sampling) -> None:
    """Refuses impossible settings.

    Args:
        prompts: Number of prompts.
        max_new_tokens: Maximum number of tokens of a continuation.
        sampling: How tokens are chosen.
    """
    temperature = sampling.temperature
    for wrong, sentence in (
        (not prompts, "there is no prompt: give at least one, which may be empty"),
        (max_new_tokens < 1, f"max_new_tokens is {max_new_tokens}, but must be 1 or more"),
        (
            not (temperature > 0 and math.isfinite(temperature)) and not sampling.greedy,
            f"temperature is {temperature}, but must be a number above 0: for deterministic text, use greedy",
        ),
        (sampling.top_k < 0, f"top_k is {sampling.top_k}, but must be 1 or more, or 0 for all tokens"),
        (not 0 < sampling.top_p <= 1, f"top_p is {sampling.top_p}, but must be above 0 and at most 1"),
    ):
        if wrong:
            raise UserError(sentence)
