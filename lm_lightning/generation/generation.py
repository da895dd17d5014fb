"""Generation: continues prompts, so that the text does not depend on the other prompts of a batch."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from lm_lightning.generation import recording
from lm_lightning.generation.sampling import Sampling, check
from lm_lightning.networks import positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# settings of a generation config that do not change which tokens are chosen
NO_DECODING = re.compile(r"(bos|eos|pad)_token_id|transformers_version|_.*|.*cache.*|output_.*|return_dict_in_generate")


def processors(sampling: Sampling, prompts: list[list[int]]) -> LogitsProcessorList:
    """The processors that convert a row of logits for each prompt to scores whose maximum is the next token."""
    if sampling.greedy:
        return LogitsProcessorList()
    chain: list[LogitsProcessor] = [TemperatureLogitsWarper(float(sampling.temperature))]
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    return LogitsProcessorList([*chain, GumbelNoise(sampling.seed, prompts)])


class GumbelNoise(LogitsProcessor):
    """Adds Gumbel noise, so that the maximum is a sample of the softmax (Gumbel, 1954).

    Each row has its own random generator, whose seed also depends on the prompt, so that the text does not depend on
    the other prompts of the batch.
    """

    def __init__(self, seed: int, prompts: list[list[int]]) -> None:
        seeds = [seed_of(seed, sequence_key(prompt)) for prompt in prompts]
        self.generators = [torch.Generator().manual_seed(value) for value in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = torch.stack([torch.rand(scores.shape[1], generator=g) for g in self.generators])
        return scores - (-uniform.clamp(min=1e-20).log()).log().to(scores)


class ForbidPadding(LogitsProcessor):
    """Forbids ids that are not tokens, which a network has if its vocabulary is padded."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self.vocab_size :] = -torch.inf
        return scores


def prompt_ids(tokenizer: "PreTrainedTokenizerFast", prompt: str) -> list[int]:
    """Tokenizes a prompt like the beginning of a training document; an empty prompt begins a new document.

    The string of a special token in a prompt is plain text, as in training data.

    Raises:
        UserError: If the prompt has invalid characters.
    """
    prefix, suffix = document_ids(tokenizer)
    if not prompt:
        return prefix or suffix  # without a token at their beginning, documents follow the end token of another
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that are not UTF-8
        raise UserError(f"character {error.start + 1} of the prompt is not valid Unicode: remove it") from error
    return prefix + tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def end_ids(network: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """The tokens that end a text: the end token of documents, and those of the network's generation config.

    Those of the generation config must be special tokens of the tokenizer, since the network may have been made for
    another tokenizer.
    """
    own = getattr(network.generation_config, "eos_token_id", None)
    known = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    more = own if isinstance(own, list) else [own]
    named = [token for token in more if type(token) is int and token in known]
    return list(dict.fromkeys([document_ids(tokenizer)[1][-1], *named]))


def describe_generation_config(network: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast") -> str:
    """A line about the settings of the network's generation config that are used or ignored; empty if it has none."""
    settings = network.generation_config.to_diff_dict()
    ignored = [f"{name} {value}" for name, value in settings.items() if not NO_DECODING.fullmatch(name)]
    ends = end_ids(network, tokenizer)
    parts = []
    if len(ends) > 1:
        parts.append(f"texts end at {' or '.join(map(str, tokenizer.convert_ids_to_tokens(ends)))}")
    if ignored:
        parts.append(f"ignored: {', '.join(ignored)}")
    return f"the model's generation_config: {'; '.join(parts)}" if parts else ""


@contextmanager
def plain_generation(network: "PreTrainedModel") -> Iterator[None]:
    """Makes `network.generate` use only its arguments.

    Otherwise `transformers` uses the network's generation config, such as a repetition penalty, for missing arguments.
    """
    own, network.generation_config = network.generation_config, GenerationConfig()
    try:
        yield
    finally:
        network.generation_config = own


class Continuation:
    """Decodes tokens while they are generated, in pieces that do not change later.

    Tokens are decoded together with the tokens before them: many tokenizers drop the space before the first word of a
    text, and a character may consist of several tokens.

    Args:
        tokenizer: The tokenizer.
        prompt: Tokens before the generated ones.
    """

    CONTEXT = 8  # number of tokens of the prompt that are decoded with the text

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", prompt: list[int]) -> None:
        self.tokenizer, self.ids = tokenizer, prompt[-self.CONTEXT :]
        self.done = len(self.ids)  # number of tokens that are already in the text

    def add(self, token: int) -> str:
        """Adds a token and returns the text that is now final; empty while a character is incomplete."""
        self.ids.append(token)
        new = self.rest()
        if not new or new.endswith("\ufffd"):
            return ""
        self.ids, self.done = self.ids[self.done :], len(self.ids) - self.done
        return new

    def rest(self) -> str:
        """The text of the tokens that have not been returned yet."""
        before, whole = self.decode(self.ids[: self.done]), self.decode(self.ids)
        return whole[len(before) :]

    def decode(self, ids: list[int]) -> str:
        """Decodes without special tokens, and without "clean up", which would change text that is already final."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Streamer(BaseStreamer):
    """Writes text while it is generated.

    Args:
        continuation: Decodes the tokens.
        ends: Tokens that end the text.
        write: Called with each piece of the text.
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
    fast: bool = True,
) -> list[str]:
    """Continues prompts until an end token or the maximum number of tokens.

    The text of a prompt does not depend on the other prompts. Decoding settings of the network's generation config are
    ignored.

    Args:
        network: A causal network; it is in evaluation mode afterwards.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt; see `prompt_ids`.
        max_new_tokens: Maximum number of tokens of a continuation.
        sampling: How tokens are chosen.
        vocab_size: Number of ids of the network that are tokens. Default: all.
        write: Called with each piece of the text while it is generated; only for a single prompt.
        notice: Called with a message if the network's context is too short for `max_new_tokens`.
        names: Names of the prompts, for messages.
        fast: Whether to use the faster loop of `recording.py` on CPUs, for networks that it supports.

    Returns:
        The continuations, without prompts and special tokens.

    Raises:
        UserError: If a prompt is too long for the network's context.
    """
    check(len(prompts), max_new_tokens, sampling)
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
    # Prompts that nearly fill the context are batched by length, so that long ones do not shorten the text of others.
    batches = {(new, 0 if new == max_new_tokens else len(prompt)) for new, prompt in zip(rooms, prompts)}
    for new, length in sorted(batches, reverse=True):
        rows = [i for i, prompt in enumerate(prompts) if rooms[i] == new and length in (0, len(prompt))]
        own = [prompts[i] for i in rows]
        streamer = Streamer(Continuation(tokenizer, own[0]), ends, write) if write else None
        for i, answer in zip(rows, answers(network, own, new, sampling, ends, vocab_size, streamer, fast)):
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
    fast: bool = True,
) -> list[list[int]]:
    """The tokens that a network generates after each prompt, without the end token; see `generate`."""
    chain = processors(sampling, prompts)
    if vocab_size is not None:
        chain.insert(0, ForbidPadding(vocab_size))
    if fast and recording.supports(network.eval()):
        found = recording.decode(network, prompts, max_new_tokens, ends, chain, streamer)
        return [list(takewhile(lambda token: token not in ends, row)) for row in found]
    longest = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), ends[0])
    attention_mask = torch.zeros_like(input_ids)
    for i, prompt in enumerate(prompts):  # padding on the left, so that the new tokens directly follow all prompts
        input_ids[i, longest - len(prompt) :] = torch.tensor(prompt)
        attention_mask[i, longest - len(prompt) :] = 1
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,  # the maximum is chosen; the processors add the randomness
        eos_token_id=ends,
        pad_token_id=ends[0],
    )
    with plain_generation(network):
        output = network.eval().generate(
            input_ids=input_ids.to(network.device),
            attention_mask=attention_mask.to(network.device),
            generation_config=settings,
            logits_processor=chain,
            streamer=streamer,
        )
    return [list(takewhile(lambda token: token not in ends, row)) for row in output[:, longest:].tolist()]


def room(network: "PreTrainedModel", prompt: list[int], max_new_tokens: int, name: str) -> int:
    """Number of tokens that can be generated after a prompt, at most `max_new_tokens`.

    Args:
        network: A causal network.
        prompt: Token ids.
        max_new_tokens: Maximum number of tokens.
        name: Name of the prompt, for messages.

    Raises:
        UserError: If the context has no room for new tokens.
    """
    limit = context_limit(network)
    if len(prompt) >= limit:
        raise UserError(
            f"{name} has {len(prompt)} tokens, but the context length of the network is {limit:.0f}, and at least one "
            "token must be left for new text: shorten it"
        )
    return int(min(max_new_tokens, limit - len(prompt)))


def context_limit(network: "PreTrainedModel") -> float:
    """Maximum context length of the network; infinite if there is no limit."""
    return positions(network) or float("inf")
