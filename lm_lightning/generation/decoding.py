"""Decoding of encoder-decoders: how their texts are searched, as settings that exported models keep."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Optional

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from lm_lightning.errors import UserError
from lm_lightning.generation.generation import ForbidPadding

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass
class Decoding:
    """How texts are generated, in evaluations, in `predict` and by exported models.

    Args:
        num_beams: Number of texts that the search keeps at each step; 1 always takes the most probable token.
        max_new_tokens: Maximum number of tokens of a text, including its end.
        min_new_tokens: Minimum number of tokens before its end.
        length_penalty: The log-probability of a text is divided by its length to this power: above 0 favors long texts,
            below 0 short ones. Only for more than one beam.
        no_repeat_ngram_size: No n-gram of this size occurs twice in a text; 0 allows it.
        early_stopping: Whether the search ends when `num_beams` texts are complete, or when no better one is likely.
    """

    num_beams: int = 1
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    early_stopping: bool = False

    def check(self) -> None:
        """Refuses invalid options."""
        limits = {"num_beams": 1, "max_new_tokens": 1, "min_new_tokens": 0, "no_repeat_ngram_size": 0}
        for name, least in limits.items():
            if (value := getattr(self, name)) < least:
                raise UserError(f"model.decoding.{name} is {value}, but must be {least} or more")
        if self.min_new_tokens >= self.max_new_tokens:
            raise UserError(
                f"model.decoding.min_new_tokens is {self.min_new_tokens}, but must be less than max_new_tokens, "
                f"{self.max_new_tokens}"
            )

    def config(self, **tokens: Optional[int]) -> GenerationConfig:
        """The generation config of `transformers`.

        Args:
            tokens: Its special tokens, such as `eos_token_id`.
        """
        beams = {"length_penalty": self.length_penalty, "early_stopping": self.early_stopping}
        return GenerationConfig(
            do_sample=False,
            num_beams=self.num_beams,
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens or None,
            no_repeat_ngram_size=self.no_repeat_ngram_size or None,
            **(beams if self.num_beams > 1 else {}),
            **tokens,
        )


@torch.no_grad()
def write_texts(
    network: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    input_ids: Tensor,
    attention_mask: Tensor,
    vocab_size: Optional[int] = None,
    together: bool = False,
) -> list[str]:
    """The texts that an encoder-decoder writes, as its generation config says, without special tokens.

    Args:
        network: In evaluation mode.
        tokenizer: Of its texts.
        input_ids: Tokens of the sources, (B, T) int64.
        attention_mask: 1 for tokens, 0 for padding, (B, T) int64.
        vocab_size: Number of ids of the network that are tokens. Default: all.
        together: Whether all processes go on until each of them is done, as they must with a sharded network.
    """
    processors = LogitsProcessorList([] if vocab_size is None else [ForbidPadding(vocab_size)])
    output = network.generate(
        input_ids=input_ids.to(network.device),
        attention_mask=attention_mask.to(network.device),
        logits_processor=processors,
        synced_gpus=together,
    )
    return tokenizer.batch_decode(output, skip_special_tokens=True, clean_up_tokenization_spaces=False)
