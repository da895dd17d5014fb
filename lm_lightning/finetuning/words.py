"""Tokenizes sentences that are split into words, and finds the token that represents each word."""

from itertools import accumulate
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TRUNCATED = -1  # position of the token of a word that is truncated


def encode_words(tokenizer: "PreTrainedTokenizerFast", sentences: list[list[str]], max_length: int) -> list[dict]:
    """Tokenizes sentences as texts with spaces between the words, which is also the input of `transformers` pipelines.

    Args:
        tokenizer: A fast tokenizer.
        sentences: The words of each sentence.
        max_length: Maximum number of tokens of a sentence, including special tokens; longer ones are truncated.

    Returns:
        For each sentence, the tokenizer's output and `words`, (W,) int64: the position of each word's first token, or
        `TRUNCATED`. A word without tokens, such as a control character, is replaced by the unknown token.
    """
    rows = tokenized(tokenizer, sentences, max_length)
    lost = [number for number, row in enumerate(rows) if any(word is None for word in row["words"])]
    if lost and tokenizer.unk_token is not None:
        filled = [
            [tokenizer.unk_token if place is None else word for word, place in zip(sentences[n], rows[n]["words"])]
            for n in lost
        ]
        for number, row in zip(lost, tokenized(tokenizer, filled, max_length)):
            rows[number] = row
    for row in rows:
        row["words"] = torch.tensor([TRUNCATED if place is None else place for place in row["words"]])
    return rows


def tokenized(tokenizer: "PreTrainedTokenizerFast", sentences: list[list[str]], max_length: int) -> list[dict]:
    """The tokenizer's output for each sentence, and `words`: positions of first tokens, `TRUNCATED`, or None."""
    encoded = tokenizer(
        [" ".join(words) for words in sentences],
        return_attention_mask=False,
        return_offsets_mapping=True,
        truncation=True,
        max_length=max_length,
    )
    offsets = encoded.pop("offset_mapping")
    rows = [dict(zip(encoded, values)) for values in zip(*encoded.values())]
    for row, places, words, encoding in zip(rows, offsets, sentences, encoded.encodings):
        ends = list(accumulate(len(word) + 1 for word in words))  # where the words end, including the space after them
        first: list[int | None] = [None] * len(words)
        word, seen = 0, 0
        for place, (start, end) in enumerate(places):
            if start == end:  # a special token
                continue
            seen = end
            while end > ends[word]:  # the last character counts: some tokens begin with the space before the word
                word += 1
            if first[word] is None:
                first[word] = place
        if encoding.overflowing:
            first = [TRUNCATED if place is None and end > seen else place for place, end in zip(first, ends)]
        row["words"] = first
    return rows
