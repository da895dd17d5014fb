"""Data of BERT's pretraining: tokens of the shards in, blocks with hidden tokens out.

Without next sentences, documents, each with the special tokens that its tokenizer puts around a text, are one long row
that is cut into full blocks: nothing is padded. With them, a block is `[CLS] A [SEP] B [SEP]` with segment ids, padded
where the documents end. What is hidden is drawn from (seed, epoch, sample): anew in each epoch, the same in each run.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Optional

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lm_lightning.data import inspection, shards
from lm_lightning.data.corpus import Corpus
from lm_lightning.data.order import PADDING, samples_at
from lm_lightning.data.pretraining import PretrainingData, collate
from lm_lightning.data.tokenizer import Tokenizer, text_ids, unknown_id, unknown_word, warn_of_unknown
from lm_lightning.errors import UserError
from lm_lightning.tasks.masked_lm.masking import Masker, Masking
from lm_lightning.tasks.masked_lm.sentences import SentencePairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class MaskedBlocks(Dataset):
    """Blocks of T tokens, at most K of which are predicted.

    Args:
        split: Tokens.
        block_size: T.
        masker: Hides tokens.
        seed: Seed of the order and of what is hidden; None for the split's own order and the same masks in every run.

    Items are dicts of `input_ids` (T,), `positions` (K,) of the targets and `targets` (K,), all int64, with -100 where
    there is none, and `id`, an int.
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
        sample, generator = drawn(position, self.size, self.seed)
        start = min(sample * self.block_size, len(self.split.tokens) - self.block_size)
        rows = slice(start, start + self.block_size)
        seen, positions, targets = self.masker(
            self.split.tokens[rows].astype(np.int64), generator, self.split.words[rows]
        )
        targets[positions < sample * self.block_size - start] = -100  # the last block overlaps with the one before
        return {
            "input_ids": torch.from_numpy(seen),
            "positions": torch.from_numpy(positions),
            "targets": torch.from_numpy(targets),
            "id": sample,
        }


class MaskedPairs(Dataset):
    """Sentence pairs of at most T tokens, at most K of which are predicted.

    Args:
        pairs: Gives the segments.
        around: Ids of `[CLS]` and `[SEP]`.
        padding: Id of `[PAD]`.
        block_size: T.
        masker: Hides tokens.
        seed: As for `MaskedBlocks`.

    Items are those of `MaskedBlocks` with `token_type_ids` and `attention_mask`, both (T,) int64, and `next_sentence`,
    () int64: 0 if B follows A, 1 if not, -100 if it does not count.
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
        sample, generator = drawn(position, len(self), self.seed)
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


def drawn(position: int, size: int, seed: Optional[int]) -> tuple[int, np.random.Generator]:
    """The sample at a position of the stream, and what decides its masks."""
    if seed is None:
        return position, np.random.default_rng([0, position])
    sample = int(samples_at(np.array([position]), size, seed)[0])
    return sample, np.random.default_rng([seed, position // size, sample])


class Texts(Dataset):
    """Texts that hold mask tokens, to be filled in.

    Items are dicts of `input_ids` and `attention_mask`, both (tokens,) int64, and `id`.
    """

    def __init__(self, texts: list[str], data: "MaskedData") -> None:
        tokenizer = data.tokenizer
        self.rows = []
        unknown = unknown_id(tokenizer)
        for text in texts:
            # here the mask token is meant, which in the texts of a corpus is text
            ids = tokenizer(text, split_special_tokens=False)["input_ids"]
            if tokenizer.mask_token_id not in ids:
                raise UserError(f"there is nothing to fill in, no {tokenizer.mask_token}, in the text {text!r}")
            if len(ids) > data.block_size:
                raise UserError(
                    f"the text {text[:40]!r}... has {len(ids)} tokens, more than data.block_size {data.block_size}: "
                    "shorten it or raise that"
                )
            shown = len(ids) - sum(map(len, text_ids(tokenizer)))
            if data.trainer.is_global_zero and unknown in ids:
                remedy = "use words that the model was trained on"
                warn_of_unknown(
                    f"the text {text[:40]!r}", ids.count(unknown), shown, unknown_word(tokenizer, [text]), remedy
                )
            self.rows.append(torch.tensor(ids))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        return {"input_ids": self.rows[i], "attention_mask": torch.ones_like(self.rows[i]), "id": i}


class MaskedData(PretrainingData):
    """Blocks with hidden tokens for masked language modelling, with or without BERT's next-sentence pairs.

    Args:
        corpus: Where the documents come from; by default the built-in corpus.
        tokenizer: Which tokenizer turns them into tokens; by default one trained on the corpus.
        masking: What is hidden.
        next_sentence: Whether blocks are pairs of segments, whose second follows the first or does not.
        language: Language of the rules by which next-sentence pairs split documents into sentences, such as `en`, `zh`.
        block_size: Tokens of a block.
        batch_size: Blocks in a micro-batch of one process.
        texts: What `predict` fills in: texts with mask tokens, such as "The capital of [MASK] is Paris."
        num_workers: Processes that load and mask batches ahead.
        cache_dir: Folder that keeps trained tokenizers and tokenized corpora for the next run.
    """

    def __init__(
        self,
        corpus: Corpus = Corpus(),
        tokenizer: Tokenizer = Tokenizer(algorithm="wordpiece", lowercase=True),
        masking: Masking = Masking(),
        next_sentence: bool = False,
        language: str = "en",
        block_size: int = 128,
        batch_size: int = 16,
        texts: list[str] | str = (),  # type: ignore[assignment]
        num_workers: int = 0,
        cache_dir: str = "~/.cache/lm_lightning",
    ) -> None:
        super().__init__(corpus, tokenizer, block_size, batch_size, False, num_workers, cache_dir)
        self.masking, self.next_sentence, self.language = masking, next_sentence, language
        self.texts = [texts] if isinstance(texts, str) else list(texts)
        if next_sentence and masking.unit == "space":
            raise UserError("data.masking.unit space does not go with data.next_sentence: take word, token or span")

    def layout(self) -> shards.Layout:
        return shards.Layout("bert", self.language if self.next_sentence else None, self.masking.unit == "space")

    def prepare_corpus(self, show: Sequence[int] = ()) -> None:
        """The same as for GPTs; samples are shown as they are before masking."""
        self.check()
        prepared = shards.prepare(self.corpus, self.tokenizer_options, self.layout(), self.cache_dir)
        room = self.room(prepared.tokenizer)
        if not show:
            return inspection.print_counts(prepared, room, omitted=0, full=() if self.next_sentence else ("train",))
        if self.next_sentence:
            print("a pair begins with this segment; the second one may be of any document, and is another each epoch")
        inspection.print_samples(prepared, room, show)

    def samples(self, split: str) -> MaskedBlocks | MaskedPairs:
        masker = Masker(self.masking, self.tokenizer, self.block_size)
        seed = self.seed if split == "train" else None
        if not self.next_sentence:
            return MaskedBlocks(self.splits[split], self.block_size, masker, seed)
        pairs = SentencePairs(self.splits[split], self.room(self.tokenizer), split)
        return MaskedPairs(pairs, text_ids(self.tokenizer), self.tokenizer.pad_token_id, self.block_size, masker, seed)

    def room(self, tokenizer: "PreTrainedTokenizerFast") -> int:
        """Tokens of the split that a block has room for."""
        if not self.next_sentence:
            return self.block_size
        before, after = text_ids(tokenizer)
        room = self.block_size - len(before) - 2 * len(after)
        if room < 2:
            raise UserError(f"data.block_size {self.block_size} has no room for two segments: raise it")
        return room

    def predict_dataloader(self) -> DataLoader:
        """The texts to fill in, one a batch."""
        if not self.texts:
            raise UserError(f'say what to fill in: --data.texts "The capital of {self.tokenizer.mask_token} is ..."')
        return DataLoader(Texts(self.texts, self), batch_size=1, collate_fn=collate)

    def identity(self) -> dict:
        return super().identity() | {"data.masking": vars(self.masking), "data.next_sentence": self.next_sentence}
