"""Data of BERT's pretraining: cuts the tokens of the shards into blocks, and masks tokens.

Without next-sentence prediction, documents, with the special tokens that the tokenizer adds around a text, are
concatenated and cut into full blocks without padding. With it, a block is `[CLS] A [SEP] B [SEP]` with segment ids, and
padded if the documents are too short. The masked tokens depend on (seed, epoch, sample): they differ between epochs,
but are the same in each run.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Optional

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lm_lightning.data import cache, inspection, shards
from lm_lightning.data.corpus import Corpus
from lm_lightning.data.mixture import MixedCorpus, MixtureStage, labelled
from lm_lightning.data.order import PADDING, samples_at
from lm_lightning.data.pretraining import PretrainingData, collate
from lm_lightning.data.tokenizer import Tokenizer, text_ids, unknown_id, unknown_word, warn_about_unknown
from lm_lightning.errors import UserError
from lm_lightning.tasks.masked_lm.masking import Masker, Masking
from lm_lightning.tasks.masked_lm.sentences import SentencePairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class MaskedBlocks(Dataset):
    """Blocks of T tokens; at most K of them are predicted.

    Args:
        split: Tokens.
        block_size: T.
        masker: Masks tokens.
        seed: Seed of the order and of the masks; None for the order of the split and the same masks in every run.

    Items are dicts of `input_ids` (T,), `positions` (K,) of the targets, and `targets` (K,), -100 for missing ones, all
    int64; and `id`, an int.
    """

    def __init__(self, split: shards.Split, block_size: int, masker: Masker, seed: Optional[int]) -> None:
        self.split, self.block_size, self.masker, self.seed = split, block_size, masker, seed
        self.size = len(split.tokens) // block_size if seed is not None else -(-len(split.tokens) // block_size)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, position: int) -> dict:
        if position == PADDING:
            item = self[0]
            return item | {"targets": torch.full_like(item["targets"], -100), "id": PADDING}
        sample, generator = draw_sample(position, self.size, self.seed)
        start = min(sample * self.block_size, len(self.split.tokens) - self.block_size)
        rows = slice(start, start + self.block_size)
        seen, positions, targets = self.masker(
            self.split.tokens[rows].astype(np.int64), generator, self.split.words[rows]
        )
        targets[positions < sample * self.block_size - start] = -100  # the last block overlaps the one before
        return {
            "input_ids": torch.from_numpy(seen),
            "positions": torch.from_numpy(positions),
            "targets": torch.from_numpy(targets),
            "id": sample,
        }


class MaskedPairs(Dataset):
    """Sentence pairs of at most T tokens; at most K of them are predicted.

    Args:
        pairs: The pairs of segments.
        around: Ids of `[CLS]` and `[SEP]`.
        padding: Id of `[PAD]`.
        block_size: T.
        masker: Masks tokens.
        seed: As for `MaskedBlocks`.

    Items are those of `MaskedBlocks` with `token_type_ids` and `attention_mask`, both (T,) int64, and `next_sentence`,
    () int64: 0 if B follows A, 1 if not, -100 if it is ignored.
    """

    def __init__(
        self,
        pairs: SentencePairs,
        around: tuple[list[int], list[int]],
        padding: int,
        block_size: int,
        masker: Masker,
        seed: Optional[int],
    ) -> None:
        self.pairs, self.around, self.padding, self.block_size = pairs, around, padding, block_size
        self.masker, self.seed = masker, seed

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, position: int) -> dict:
        if position == PADDING:
            item = self[0]
            nothing = {name: torch.full_like(item[name], -100) for name in ("targets", "next_sentence")}
            return item | nothing | {"id": PADDING}
        sample, generator = draw_sample(position, len(self), self.seed)
        a, b, label = self.pairs.pair(sample, generator)
        before, after = self.around
        first = np.concatenate([before, a, after]).astype(np.int64)
        ids = np.concatenate([first, b, after]).astype(np.int64)
        seen, positions, targets = self.masker(ids, generator, np.empty(0, np.uint8))
        item = {
            "input_ids": np.full(self.block_size, self.padding, np.int64),
            "attention_mask": np.zeros(self.block_size, np.int64),
            "token_type_ids": np.zeros(self.block_size, np.int64),
        }
        item["input_ids"][: len(ids)] = seen
        item["attention_mask"][: len(ids)] = 1
        item["token_type_ids"][len(first) : len(ids)] = 1
        item |= {"positions": positions, "targets": targets, "next_sentence": np.array(label)}
        return {name: torch.from_numpy(array) for name, array in item.items()} | {"id": sample}


def draw_sample(position: int, size: int, seed: Optional[int]) -> tuple[int, np.random.Generator]:
    """The sample at a position of the stream, and the random generator for its masks."""
    if seed is None:
        return position, np.random.default_rng([0, position])
    sample = int(samples_at(np.array([position]), size, seed)[0])
    return sample, np.random.default_rng([seed, position // size, sample])


class Texts(Dataset):
    """Texts with mask tokens to fill in.

    Items are dicts of `input_ids` and `attention_mask`, both (tokens,) int64, and `id`.
    """

    def __init__(self, texts: list[str], data: "MaskedData") -> None:
        tokenizer = data.tokenizer
        self.rows = []
        unknown = unknown_id(tokenizer)
        for text in texts:
            # Here, the string of the mask token is that token; in a corpus it is plain text.
            ids = tokenizer(text, split_special_tokens=False)["input_ids"]
            if tokenizer.mask_token_id not in ids:
                raise UserError(f"the text {text!r} has no {tokenizer.mask_token} to fill in: add one")
            if len(ids) > data.block_size:
                raise UserError(
                    f"the text {text[:40]!r}... has {len(ids)} tokens, more than data.block_size {data.block_size}: "
                    "shorten it or increase data.block_size"
                )
            shown = len(ids) - sum(map(len, text_ids(tokenizer)))
            if data.trainer.is_global_zero and unknown in ids:
                remedy = "use words with which the model was trained"
                warn_about_unknown(
                    f"the text {text[:40]!r}", ids.count(unknown), shown, unknown_word(tokenizer, [text]), remedy
                )
            self.rows.append(torch.tensor(ids))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        return {"input_ids": self.rows[i], "attention_mask": torch.ones_like(self.rows[i]), "id": i}


class MaskedData(PretrainingData):
    """Blocks with masked tokens for masked language modeling, with or without BERT's next-sentence prediction.

    Args:
        corpus: The documents. Default: the built-in corpus.
        tokenizer: The tokenizer. Default: one that is trained on the corpus.
        corpora: Several corpora instead of one, by names that you choose, each with the options of `corpus` and a
            `weight`, such as `{novels: {paths: novels, weight: 0.7}, code: {paths: src, weight: 0.3}}`.
        temperature: Without weights, the share of a corpus is proportional to `tokens ** (1 / temperature)`, where
            `tokens` is the size of its training split: 1, the default, is proportional to the sizes; higher values make
            the shares more equal.
        stages: Other weights or another temperature from a point of the training on: a list such as
            `[{start: 0.8, weights: {code: 1}}]`, sorted by `start`.
        masking: Which tokens are masked.
        next_sentence: Whether blocks are pairs of segments for next-sentence prediction: the second segment follows the
            first one, or is from another document.
        language: Language whose rules split documents into sentences for next-sentence prediction, such as `en`, `zh`.
        block_size: Number of tokens of a block.
        batch_size: Number of blocks per micro-batch and process.
        texts: Texts with mask tokens that `predict` fills in, such as "The capital of [MASK] is Paris."
        num_workers: Number of processes that load and mask batches in advance.
        cache_dir: Folder in which trained tokenizers and tokenized corpora are cached.
    """

    def __init__(
        self,
        corpus: Corpus = Corpus(),
        tokenizer: Tokenizer = Tokenizer(algorithm="wordpiece", lowercase=True),
        corpora: Optional[dict[str, MixedCorpus]] = None,
        temperature: Optional[float] = None,
        stages: Sequence[MixtureStage] = (),
        masking: Masking = Masking(),
        next_sentence: bool = False,
        language: str = "en",
        block_size: int = 128,
        batch_size: int = 16,
        texts: list[str] | str = (),  # type: ignore[assignment]
        num_workers: int = 0,
        cache_dir: str = cache.DEFAULT,
    ) -> None:
        super().__init__(
            corpus, tokenizer, corpora, temperature, stages, block_size, batch_size, False, num_workers, cache_dir
        )
        self.masking, self.next_sentence, self.language = masking, next_sentence, language
        self.texts = [texts] if isinstance(texts, str) else list(texts)
        if next_sentence and masking.unit == "space":
            raise UserError(
                "data.masking.unit space cannot be combined with data.next_sentence: use word, token or span"
            )

    def layout(self) -> shards.Layout:
        return shards.Layout("bert", self.language if self.next_sentence else None, self.masking.unit == "space")

    def prepare_corpus(self, show: Sequence[int] = ()) -> None:
        """The same as for GPTs; samples are printed without masks."""
        if show and self.next_sentence:
            print("a pair begins with this segment; the second one may be from any document, and changes each epoch")
        super().prepare_corpus(show)

    def print_counts(self, prepared: dict[str, shards.Prepared]) -> None:
        room = self.sample_tokens(next(iter(prepared.values())).tokenizer)
        inspection.print_counts(prepared, room, omitted=0, full=() if self.next_sentence else ("train",))
        self.print_shares(prepared)

    def corpus_samples(self, split: str, corpus: str) -> MaskedBlocks | MaskedPairs:
        masker = Masker(self.masking, self.tokenizer, self.block_size)
        tokens, seed = self.opened[split][corpus], self.order_seed(split, corpus)
        if not self.next_sentence:
            return MaskedBlocks(tokens, self.block_size, masker, seed)
        pairs = SentencePairs(tokens, self.sample_tokens(self.tokenizer), labelled(split, corpus))
        return MaskedPairs(pairs, text_ids(self.tokenizer), self.tokenizer.pad_token_id, self.block_size, masker, seed)

    def sample_tokens(self, tokenizer: "PreTrainedTokenizerFast") -> int:
        """Number of tokens that fit into a block, without the special tokens of pairs."""
        if not self.next_sentence:
            return self.block_size
        before, after = text_ids(tokenizer)
        room = self.block_size - len(before) - 2 * len(after)
        if room < 2:
            raise UserError(f"data.block_size {self.block_size} is too small for two segments: increase it")
        return room

    def predict_dataloader(self) -> DataLoader:
        """The texts to fill in, one per batch."""
        if not self.texts:
            raise UserError(
                f'there is no text to fill in: give --data.texts "The capital of {self.tokenizer.mask_token} is ..."'
            )
        return DataLoader(Texts(self.texts, self), batch_size=1, collate_fn=collate)

    def identity(self) -> dict:
        return super().identity() | {"data.masking": vars(self.masking), "data.next_sentence": self.next_sentence}
