"""Generation: prompts in, continuations out, the same alone as in a batch."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Optional

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from lm_lightning.data.order import seed_of, sequence_key
from lm_lightning.data.tokenizer import document_ids
from lm_lightning.errors import UserError
from lm_lightning.networks import positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# settings of a generation config that do not change which tokens are chosen
NO_DECODING = re.compile(r"(bos|eos|pad)_token_id|transformers_version|_.*|.*cache.*|output_.*|return_dict_in_generate")


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

    Each row has a random generator of its own, seeded with its prompt, too, so that a prompt's text does not depend on
    the other prompts of its batch.
    """

    def __init__(self, seed: int, prompts: list[list[int]]) -> None:
        seeds = [seed_of(seed, sequence_key(prompt)) for prompt in prompts]
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
    """The tokens of a prompt as a document of the training data would begin; an empty one begins a new document.

    The string of a special token in a prompt is plain text, as in training data.

    Raises:
        UserError: If the prompt has characters that no text can have.
    """
    prefix, suffix = document_ids(tokenizer)
    if not prompt:
        return prefix or suffix  # documents without a mark at their beginning follow the mark at the end of another
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that are not UTF-8
        raise UserError(f"the prompt has a character that is not valid Unicode at place {error.start + 1}") from error
    return prefix + tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def chat_ids(tokenizer: "PreTrainedTokenizerFast", turns: list[dict[str, str]]) -> list[int]:
    """The tokens of a dialogue in the chat template, up to where the model's next turn begins.

    Only the template's special tokens are special: their strings within a turn are plain text, so that nobody can end
    their own turn or write one in the name of the system.

    Args:
        tokenizer: With a chat template.
        turns: `role` and `content` of each.
    """
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    pattern = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
    text = "".join(turn["content"] for turn in turns)
    # a character that is in no turn, put into the strings of special tokens to tell them from the template's
    mark = next(chr(code) for code in range(0xFDD0, 0xFDF0) if chr(code) not in text)
    marked = [
        {**turn, "content": pattern.sub(lambda match: match[0][0] + mark + match[0][1:], turn["content"])}
        for turn in turns
    ]
    chat = tokenizer.apply_chat_template(marked, add_generation_prompt=True, tokenize=False)

    def ids(part: str, plain: bool) -> list[int]:
        return tokenizer(part, add_special_tokens=False, split_special_tokens=plain)["input_ids"] if part else []

    if mark not in chat:
        return ids(chat, plain=False)
    found, start, begin = [], 0, 0  # texts between special tokens of the template; those with a mark are encoded alone
    for match in [*pattern.finditer(chat), None]:
        end = match.start() if match else len(chat)
        if mark in chat[begin:end]:
            found += ids(chat[start:begin], plain=False) + ids(chat[begin:end].replace(mark, ""), plain=True)
            start = end
        begin = match.end() if match else end
    return found + ids(chat[start:], plain=False)


def end_ids(network: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """The tokens that end an answer: that which ends a document, and those of the network's generation config.

    Of the latter, only tokens that the tokenizer knows as no part of a text: the network may have been made for another
    tokenizer.
    """
    own = getattr(network.generation_config, "eos_token_id", None)
    known = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    more = own if isinstance(own, list) else [own]
    named = [token for token in more if type(token) is int and token in known]
    return list(dict.fromkeys([document_ids(tokenizer)[1][-1], *named]))


def inherited(network: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast") -> str:
    """What of the network's generation config counts here and what does not, in one line; empty if there is nothing."""
    settings = network.generation_config.to_diff_dict()
    ignored = [f"{name} {value}" for name, value in settings.items() if not NO_DECODING.fullmatch(name)]
    ends = end_ids(network, tokenizer)
    parts = []
    if len(ends) > 1:
        parts.append(f"answers end at {' or '.join(map(str, tokenizer.convert_ids_to_tokens(ends)))}")
    if ignored:
        parts.append(f"ignored: {', '.join(ignored)}")
    return f"the model's generation_config: {'; '.join(parts)}" if parts else ""


@contextmanager
def plain_generation(network: "PreTrainedModel") -> Iterator[None]:
    """Has `network.generate` follow its arguments alone.

    `transformers` fills what they do not say from the network's generation config, such as a repetition penalty.
    """
    own, network.generation_config = network.generation_config, GenerationConfig()
    try:
        yield
    finally:
        network.generation_config = own


class Continuation:
    """Text of tokens as they come, of which each piece is final.

    Tokens are decoded together with those before them: many tokenizers drop the space before the first word of a text,
    and a character may be spread over several tokens.

    Args:
        tokenizer: Decodes.
        prompt: Tokens before the first.
    """

    CONTEXT = 8  # tokens of the prompt

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", prompt: list[int]) -> None:
        self.tokenizer, self.ids = tokenizer, prompt[-self.CONTEXT :]
        self.done = len(self.ids)  # of them, these are in the text

    def add(self, token: int) -> str:
        """The text that is certain with another token; empty where a character is incomplete."""
        self.ids.append(token)
        new = self.rest()
        if not new or new.endswith("\ufffd"):
            return ""
        self.ids, self.done = self.ids[self.done :], len(self.ids) - self.done
        return new

    def rest(self) -> str:
        """The text of the tokens that are not in it yet."""
        before, whole = self.decode(self.ids[: self.done]), self.decode(self.ids)
        return whole[len(before) :]

    def decode(self, ids: list[int]) -> str:
        """The text without special tokens; without "clean up", which would change what is there already."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Streamer(BaseStreamer):
    """Writes an answer as it comes.

    Args:
        continuation: Makes text of its tokens.
        ends: Tokens that end it.
        write: Gets the text in pieces.
    """

    def __init__(self, continuation: Continuation, ends: list[int], write: Callable[[str], None]) -> None:
        self.continuation, self.ends, self.write = continuation, ends, write
        self.is_prompt = True

    def put(self, value: Tensor) -> None:  # noqa: D102 (as in transformers)
        tokens = [] if self.is_prompt else [token for token in value.flatten().tolist() if token not in self.ends]
        self.is_prompt = False
        for token in tokens:
            if new := self.continuation.add(token):
                self.write(new)

    def end(self) -> None:  # noqa: D102
        if rest := self.continuation.rest():
            self.write(rest)


@torch.no_grad()
def generate(
    network: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    vocab_size: Optional[int] = None,
    write: Optional[Callable[[str], None]] = None,
    notice: Callable[[str], None] = lambda text: None,
    names: Optional[Sequence[str]] = None,
) -> list[str]:
    """Continues prompts until a token that ends the text or a number of tokens.

    Each gets the answer that it would get alone. Decoding settings of the network's generation config are ignored.

    Args:
        network: A causal network; is left in evaluation mode.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt; see `prompt_ids`.
        max_new_tokens: Tokens of a continuation, at most.
        sampling: How tokens are chosen.
        vocab_size: Rows of the network's vocabulary that are tokens. Default: all.
        write: Gets the answer of a single prompt in pieces, as it comes.
        notice: Is told when the network's context leaves fewer tokens than were asked for.
        names: Of the prompts, for messages.

    Returns:
        The continuations, without prompt and special tokens.

    Raises:
        UserError: A prompt that leaves no room in the network's context.
    """
    check(prompts, max_new_tokens, sampling)
    names = names or [f"prompt {number}" for number in range(1, len(prompts) + 1)]
    rooms = [room(network, prompt, max_new_tokens, name) for prompt, name in zip(prompts, names)]
    for name, new in zip(names, rooms):
        if new < max_new_tokens:
            notice(
                f"{name}: the context of {context_limit(network)} tokens leaves room for {new} new tokens, "
                f"not {max_new_tokens}"
            )
    ends = end_ids(network, tokenizer)
    texts = [""] * len(prompts)
    # Of prompts near the end of the context, each length is a batch of its own, so that none shortens another's answer.
    batches = {(new, 0 if new == max_new_tokens else len(prompt)) for new, prompt in zip(rooms, prompts)}
    for new, length in sorted(batches, reverse=True):
        rows = [i for i, prompt in enumerate(prompts) if rooms[i] == new and length in (0, len(prompt))]
        own = [prompts[i] for i in rows]
        streamer = Streamer(Continuation(tokenizer, own[0]), ends, write) if write else None
        for i, answer in zip(rows, answers(network, own, new, sampling, ends, vocab_size, streamer)):
            continuation = Continuation(tokenizer, prompts[i])
            texts[i] = "".join([continuation.add(token) for token in answer] + [continuation.rest()])
    return texts


def answers(
    network: "PreTrainedModel",
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    ends: list[int],
    vocab_size: Optional[int],
    streamer: Optional[Streamer],
) -> list[list[int]]:
    """The tokens that a network gives after each prompt, without the end; see `generate`."""
    longest = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), ends[0])
    attention_mask = torch.zeros_like(input_ids)
    for i, prompt in enumerate(prompts):  # padding on the left, so that all prompts end where the new tokens begin
        input_ids[i, longest - len(prompt) :] = torch.tensor(prompt)
        attention_mask[i, longest - len(prompt) :] = 1
    processors = sampling.processors(prompts)
    if vocab_size is not None:
        processors.insert(0, ForbidPadding(vocab_size))
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,  # the choice is the maximum; the processors hold the chance
        eos_token_id=ends,
        pad_token_id=ends[0],
    )
    with plain_generation(network):
        output = network.eval().generate(
            input_ids=input_ids.to(network.device),
            attention_mask=attention_mask.to(network.device),
            generation_config=settings,
            logits_processor=processors,
            streamer=streamer,
        )
    return [list(takewhile(lambda token: token not in ends, row)) for row in output[:, longest:].tolist()]


def room(network: "PreTrainedModel", prompt: list[int], max_new_tokens: int, name: str) -> int:
    """How many tokens the network can write after a prompt, at most those that are asked for.

    Args:
        network: Has a context.
        prompt: Token ids.
        max_new_tokens: How many are asked for.
        name: Of the prompt, for messages.

    Raises:
        UserError: If there is no room.
    """
    limit = context_limit(network)
    if len(prompt) >= limit:
        raise UserError(
            f"{name} has {len(prompt)} tokens, but this network's context holds {limit:.0f}, of which at least one "
            "must be left for the answer: shorten it"
        )
    return int(min(max_new_tokens, limit - len(prompt)))


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
