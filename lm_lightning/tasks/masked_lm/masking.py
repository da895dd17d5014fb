"""Masking: a block of tokens in; the block with some of them masked, and the masked ones, out."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from lm_lightning.data.tokenizer import vocabulary
from lm_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass
class Masking:
    """What masked language modelling hides (Devlin et al., 2019, arXiv:1810.04805). Special tokens are never hidden.

    Args:
        rate: Share of a block's tokens to predict.
        mask: Share of these that become the mask token.
        random: Share of these that become a random token; the rest stays as it is.
        unit: `token`: any tokens. `word`: all tokens of a word together; words are what the tokenizer marks as such
            (WordPiece by `##`, byte-level and SentencePiece tokenizers by their space), Chinese characters are words.
            `space`: the same, with words as white space separates them, for Chinese text that comes segmented.
            `span`: runs of tokens (Joshi et al., 2020, arXiv:1907.10529).
        mean_span: Mean length of a span, drawn from a geometric distribution, before it is limited to `max_span`.
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
        masking: What to hide.
        tokenizer: Must have a mask token, and mark words if `masking.unit` is `word`.
        length: T, tokens of a block.

    Attributes:
        targets: K, maximum number of masked positions of a block: its share of the tokens, at least 1.
    """

    def __init__(self, masking: Masking, tokenizer: "PreTrainedTokenizerFast", length: int) -> None:
        if tokenizer.mask_token_id is None:
            raise UserError("the tokenizer has no mask token: use one of a BERT-like model, or train one here")
        if not 0 < masking.rate < 1 or min(masking.mask, masking.random) < 0 or masking.mask + masking.random > 1:
            raise UserError(
                f"data.masking has rate {masking.rate}, mask {masking.mask} and random {masking.random}: these are "
                "shares, and mask and random together are at most 1"
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
            generator: Decides what is hidden.
            words: 1 where a word begins, (T,) uint8; read for unit `space`.

        Returns:
            The tokens that the network sees, (T,); the positions of the targets, (K,), ascending; and the
            original tokens there, (K,). Fewer targets than K are padded with position 0 and target -100. All int64.
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
        """`budget` of the positions `free`; by words as many as fit, but at least (the beginning of) one."""
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
    """Which tokens begin a word, by the marks of the tokenizer's kind: (vocabulary,) bool.

    Raises:
        UserError: A tokenizer that does not mark words.
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
