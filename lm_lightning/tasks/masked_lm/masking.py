"""Masking: chooses the tokens of a block that are predicted, and masks them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from lm_lightning.data.tokenizer import vocabulary
from lm_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass
class Masking:
    """Which tokens are predicted in masked language modeling (Devlin et al., 2019, arXiv:1810.04805), and how they are
    masked. Special tokens are never masked.

    Args:
        rate: Fraction of the tokens of a block to predict.
        mask: Fraction of the predicted tokens to replace by the mask token.
        random: Fraction of the predicted tokens to replace by a random token; the rest is not changed.
        unit: `token`: individual tokens. `word`: all tokens of a word together. Words are recognized by the marks of
            the tokenizer (`##` of WordPiece, the space of byte-level and SentencePiece tokenizers); each Chinese
            character is a word. `space`: the same, but words are separated by white space, for Chinese text that is
            segmented into words. `span`: sequences of tokens (Joshi et al., 2020, arXiv:1907.10529).
        mean_span: Mean of the geometric distribution of span lengths, before they are limited to `max_span`.
        max_span: Maximum length of a span.
    """

    rate: float = 0.15
    mask: float = 0.8
    random: float = 0.1
    unit: Literal["token", "word", "space", "span"] = "token"
    mean_span: float = 5.0
    max_span: int = 10


class Masker:
    """Masks blocks of one length for one tokenizer.

    Args:
        masking: Which tokens are masked.
        tokenizer: A tokenizer with a mask token, which also marks words if `masking.unit` is `word`.
        length: T, the number of tokens of a block.

    Attributes:
        targets: K, the maximum number of masked positions of a block: `masking.rate` of its tokens, at least 1.
    """

    def __init__(self, masking: Masking, tokenizer: "PreTrainedTokenizerFast", length: int) -> None:
        if tokenizer.mask_token_id is None:
            raise UserError(
                "the tokenizer has no mask token: use the tokenizer of a BERT-like model, or none to train one"
            )
        if not 0 < masking.rate < 1 or min(masking.mask, masking.random) < 0 or masking.mask + masking.random > 1:
            raise UserError(
                f"data.masking has rate {masking.rate}, mask {masking.mask} and random {masking.random}, but these "
                "must be fractions, and mask and random together at most 1"
            )
        if masking.mean_span < 1 or masking.max_span < 1:
            raise UserError(
                f"data.masking has mean_span {masking.mean_span:g} and max_span {masking.max_span}, but both must be 1 "
                "or more"
            )
        self.masking, self.mask_id = masking, tokenizer.mask_token_id
        self.targets = max(1, round(masking.rate * length))
        self.special = np.zeros(vocabulary(tokenizer), bool)
        self.special[tokenizer.all_special_ids] = True
        self.ordinary = np.flatnonzero(~self.special)
        self.begins_word = word_starts(tokenizer) if masking.unit == "word" else None

    def __call__(
        self, ids: np.ndarray, generator: np.random.Generator, words: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks a block.

        Args:
            ids: Token ids, (T,) int64.
            generator: Random generator that determines the masks.
            words: 1 where a word begins, (T,) uint8; used for unit `space`.

        Returns:
            The input tokens of the network, (T,); the positions of the targets, (K,), ascending; and the original
            tokens at these positions, (K,). If there are fewer than K targets, they are padded with position 0 and
            target -100. All are int64.
        """
        free = np.flatnonzero(~self.special[ids])
        budget = min(max(1, round(self.masking.rate * len(free))), self.targets, len(free))
        chosen = np.sort(self.choose(ids, free, budget, generator, words))

        fate = generator.random(len(chosen))
        seen = ids.copy()
        seen[chosen[fate < self.masking.mask]] = self.mask_id
        randomized = chosen[(fate >= self.masking.mask) & (fate < self.masking.mask + self.masking.random)]
        seen[randomized] = generator.choice(self.ordinary, len(randomized))

        positions = np.zeros(self.targets, np.int64)
        targets = np.full(self.targets, -100, np.int64)
        positions[: len(chosen)] = chosen
        targets[: len(chosen)] = ids[chosen]
        return seen, positions, targets

    def choose(
        self, ids: np.ndarray, free: np.ndarray, budget: int, generator: np.random.Generator, words: np.ndarray
    ) -> np.ndarray:
        """Chooses `budget` of the positions `free`; if by words, as many as fit, but at least (the start of) one."""
        if self.masking.unit == "token" or budget == 0:
            return generator.permutation(free)[:budget]
        if self.masking.unit == "span":
            chosen: set[int] = set()
            while len(chosen) < budget:
                length = min(generator.geometric(1 / self.masking.mean_span), self.masking.max_span)
                start = int(generator.integers(len(free)))
                span = free[start : start + length]
                run = span[span - np.arange(len(span)) == span[0]]  # up to the next special token
                for position in run.tolist():
                    if len(chosen) < budget:
                        chosen.add(position)
            return np.array(sorted(chosen))
        begins = self.begins_word[ids[free]] if self.begins_word is not None else words[free] == 1
        begins = begins | np.concatenate([[True], np.diff(free) != 1])  # no word continues across a special token
        bounds = np.append(np.flatnonzero(begins), len(free))
        order = generator.permutation(len(bounds) - 1)
        picked: list[int] = []
        for word in order:
            tokens = free[bounds[word] : bounds[word + 1]].tolist()
            if len(picked) + len(tokens) <= budget:
                picked += tokens
        return np.array(picked) if picked else free[bounds[order[0]] :][:budget]


def word_starts(tokenizer: "PreTrainedTokenizerFast") -> np.ndarray:
    """Which tokens begin a word, by the marks of the tokenizer's type, (vocabulary,) bool.

    Raises:
        UserError: If the tokenizer does not mark words.
    """
    result = np.ones(vocabulary(tokenizer), bool)
    tokens = tokenizer.get_vocab()
    if type(tokenizer.backend_tokenizer.model).__name__ == "WordPiece":
        for token, i in tokens.items():
            result[i] = not token.startswith("##")
    elif any(token[0] in "Ġ▁" and len(token) > 1 for token in tokens):
        for token, i in tokens.items():
            result[i] = token[0] in "Ġ▁Ċĉ" or not token[0].isalnum()
    else:
        raise UserError("this tokenizer does not mark words: use data.masking.unit token or span")
    return result
