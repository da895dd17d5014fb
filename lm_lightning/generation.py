"""Generation: prompts in, continuations out, the same alone as in a batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Optional

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from lm_lightning.data.tokenizer import document_ids
from lm_lightning.errors import UserError
from lm_lightning.models.network import positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass
class Sampling:
    """How the next token is chosen.

    Args:
        greedy: Always the most probable token; the other settings but the seed then do nothing.
        temperature: Divides the logits: under 1 sharpens, over 1 flattens the distribution.
        top_k: Only the so many most probable tokens; 0 for all.
        top_p: Only the most probable tokens that together have this probability; 1 for all.
        seed: The same seed and prompt give the same text, whatever other prompts are beside it.
    """

    greedy: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def processors(self, prompts: list[list[int]]) -> LogitsProcessorList:
        """The chain that turns a row of logits for each prompt into scores whose maximum is the next token."""
        if self.greedy:
            return LogitsProcessorList()
        chain: list[LogitsProcessor] = [TemperatureLogitsWarper(float(self.temperature))]
        if self.top_k:
            chain.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            chain.append(TopPLogitsWarper(self.top_p))
        return LogitsProcessorList([*chain, GumbelNoise(self.seed, prompts)])


class GumbelNoise(LogitsProcessor):
    """Adds Gumbel noise, so that the maximum is a sample of the softmax (Gumbel, 1954).

    Each row has a random generator of its own, seeded with its prompt, too, which is what makes a prompt's text
    independent of its batch. (The hash of integers is the same in every process.)
    """

    def __init__(self, seed: int, prompts: list[list[int]]) -> None:
        seeds = [hash((seed, *prompt)) % 2**63 for prompt in prompts]
        self.generators = [torch.Generator().manual_seed(value) for value in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = torch.stack([torch.rand(scores.shape[1], generator=g) for g in self.generators])
        return scores - (-uniform.clamp(min=1e-20).log()).log().to(scores)


class ForbidPadding(LogitsProcessor):
    """Forbids the rows of the vocabulary that are no tokens."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self.vocab_size :] = -torch.inf
        return scores


def prompt_ids(tokenizer: "PreTrainedTokenizerFast", prompt: str) -> list[int]:
    """The tokens of a prompt as a document of the training data would begin; an empty one begins a new document."""
    prefix, suffix = document_ids(tokenizer)
    if prompt:
        return prefix + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return prefix or suffix  # documents without a mark at their beginning follow the mark at the end of another


@torch.no_grad()
def generate(
    network: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    vocab_size: Optional[int] = None,
    streamer: Optional[BaseStreamer] = None,
    notice: Callable[[str], None] = lambda text: None,
) -> list[str]:
    """Continues prompts until the end-of-text token or a number of tokens.

    Args:
        network: A causal network; is left in evaluation mode.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt; see `prompt_ids`.
        max_new_tokens: Tokens of a continuation, at most.
        sampling: How tokens are chosen.
        vocab_size: Rows of the network's vocabulary that are tokens. Default: all.
        streamer: Gets the tokens of a single prompt as they come.
        notice: Is told when the network's context leaves fewer tokens than were asked for.

    Returns:
        The continuations, without prompt and special tokens.

    Raises:
        UserError: A prompt that leaves no room in the network's context.
    """
    check(prompts, max_new_tokens, sampling)
    end = document_ids(tokenizer)[1][-1]
    limit = context_limit(network)
    longest = max(len(prompt) for prompt in prompts)
    if longest >= limit:
        which = next(i for i, prompt in enumerate(prompts) if len(prompt) >= limit)
        raise UserError(
            f"prompt {which + 1} has {len(prompts[which])} tokens, but this network's context holds {limit:.0f}, of "
            "which at least one must be left for the answer: shorten it"
        )
    if longest + max_new_tokens > limit:
        notice(f"the context of {limit} tokens leaves room for {limit - longest} new tokens, not {max_new_tokens}")
        max_new_tokens = int(limit) - longest

    input_ids = torch.full((len(prompts), longest), end)
    attention_mask = torch.zeros_like(input_ids)
    for i, prompt in enumerate(prompts):  # padding on the left, so that all prompts end where the new tokens begin
        input_ids[i, longest - len(prompt) :] = torch.tensor(prompt)
        attention_mask[i, longest - len(prompt) :] = 1
    processors = sampling.processors(prompts)
    if vocab_size is not None:
        processors.insert(0, ForbidPadding(vocab_size))
    output = network.eval().generate(
        input_ids=input_ids.to(network.device),
        attention_mask=attention_mask.to(network.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,  # the choice is the maximum; the processors hold the chance
        logits_processor=processors,
        eos_token_id=end,
        pad_token_id=end,
        streamer=streamer,
    )
    texts = []
    for row in output[:, longest:].tolist():
        row = row[: row.index(end)] if end in row else row
        texts.append(tokenizer.decode(row, skip_special_tokens=True))
    return texts


def check(prompts: Sequence, max_new_tokens: int, sampling: Sampling) -> None:
    """Refuses what cannot be generated."""
    for wrong, sentence in (
        (not prompts, "there is no prompt: give at least one, which may be empty"),
        (max_new_tokens < 1, f"max_new_tokens is {max_new_tokens}, but must be 1 or more"),
        (
            sampling.temperature <= 0 and not sampling.greedy,
            f"the temperature is {sampling.temperature}, but must be above 0; for no randomness use greedy",
        ),
        (sampling.top_k < 0, f"top_k is {sampling.top_k}, but must be 1 or more, or 0 for all tokens"),
        (not 0 < sampling.top_p <= 1, f"top_p is {sampling.top_p}, but must be above 0 and at most 1"),
    ):
        if wrong:
            raise UserError(sentence)


def context_limit(network: "PreTrainedModel") -> float:
    """Tokens that the network has positions for; infinite if there is no limit."""
    return positions(network) or float("inf")
