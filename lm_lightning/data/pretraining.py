"""Data of pretraining: cuts the tokens of the shards into full blocks.

The documents of a split are concatenated to one sequence of tokens, each followed by the end-of-text token. Block `i`
consists of tokens [i·T, i·T + T], so that the inputs, and the targets, which are the inputs shifted by one, have T
tokens each, and every token of the split is a target once. There is no padding.
"""

import os
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np
import torch
from torch.utils.data import Dataset

from lm_lightning.data import cache, inspection, shards
from lm_lightning.data.corpus import Corpus
from lm_lightning.data.order import PADDING, samples_at
from lm_lightning.data.stream import StreamData
from lm_lightning.data.tokenizer import Tokenizer
from lm_lightning.errors import UserError


class Blocks(Dataset):
    """Blocks of `block_size` tokens with their targets.

    Args:
        split: Tokens and document bounds.
        block_size: T, the number of tokens of a block.
        mask_documents: Whether to add `position_ids` that restart at each document. From these, networks of
            `transformers` detect packed sequences, in which no document attends to another.
        seed: Seed of the order, or None for the order of the split.

    Items are dicts of `input_ids` (T,) int64, `targets` (T,) int64 with -100 at positions without a target, `id` int
    and, with `mask_documents`, `position_ids` (T,) int64.
    """

    def __init__(self, split: shards.Split, block_size: int, mask_documents: bool, seed: Optional[int]) -> None:
        self.split, self.block_size, self.mask_documents, self.seed = split, block_size, mask_documents, seed
        # Training uses only full blocks. In evaluation, the last block begins earlier to be full, see `__getitem__`.
        targets = len(split.tokens) - 1
        self.size = targets // block_size if seed is not None else -(-targets // block_size)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, position: int) -> dict:
        if position == PADDING:
            item = self[0]
            item["targets"] = torch.full_like(item["targets"], -100)
            return item | {"id": PADDING}
        sample = position if self.seed is None else int(samples_at(np.array([position]), self.size, self.seed)[0])
        start = min(sample * self.block_size, len(self.split.tokens) - 1 - self.block_size)
        row = torch.from_numpy(self.split.tokens[start : start + self.block_size + 1].astype(np.int64))
        item = {"input_ids": row[:-1], "targets": row[1:].clone(), "id": sample}
        item["targets"][: sample * self.block_size - start] = -100  # these belong to the block before
        if self.mask_documents:
            item["position_ids"] = torch.from_numpy(self.positions(start))
        return item

    def positions(self, start: int) -> np.ndarray:
        """Position of each input in its document, for the block that begins at token `start`, (T,) int64."""
        index = np.arange(start, start + self.block_size)
        documents = self.split.documents
        first = np.searchsorted(documents, index, side="right") - 1
        return index - np.maximum(documents[first], start)


def collate(items: list[dict]) -> dict:
    """Stacks items to a batch: tensors (B, T), and `id` as a list, which stays on the CPU."""
    batch = {key: torch.stack([item[key] for item in items]) for key in items[0] if key != "id"}
    return batch | {"id": [item["id"] for item in items]}


class PretrainingData(StreamData):
    """Packed blocks of a corpus for causal language modeling.

    Args:
        corpus: The documents. Default: the built-in corpus.
        tokenizer: The tokenizer. Default: one that is trained on the corpus.
        block_size: Number of tokens of a block, which is the context length in training.
        batch_size: Number of blocks per micro-batch and process.
        mask_documents: Whether to prevent attention between different documents of a block.
        num_workers: Number of processes that load batches in advance. 0 is fast enough unless the GPU is very fast, as
            blocks are read from a memory map.
        cache_dir: Folder in which trained tokenizers and tokenized corpora are cached.
    """

    def __init__(
        self,
        corpus: Corpus = Corpus(),
        tokenizer: Tokenizer = Tokenizer(),
        block_size: int = 256,
        batch_size: int = 16,
        mask_documents: bool = False,
        num_workers: int = 0,
        cache_dir: str = cache.DEFAULT,
    ) -> None:
        super().__init__()
        self.corpus, self.tokenizer_options = corpus, tokenizer
        self.block_size, self.batch_size, self.mask_documents = block_size, batch_size, mask_documents
        self.num_workers, self.cache_dir = num_workers, cache_dir

    collate = staticmethod(collate)

    @property
    def tokens_per_batch(self) -> int:
        """Number of input tokens per micro-batch and process."""
        return self.batch_size * self.block_size

    def layout(self) -> shards.Layout:
        """How documents are converted to tokens."""
        return shards.Layout("gpt")

    def check(self) -> None:
        """Refuses invalid sizes."""
        for name, least in (("block_size", 1), ("batch_size", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise UserError(f"data.{name} is {getattr(self, name)}, but must be {least} or more")

    def prepare_data(self) -> None:
        self.check()
        shards.prepare(self.corpus, self.tokenizer_options, self.layout(), self.cache_dir)

    def prepare_corpus(self, show: Sequence[int] = ()) -> None:
        """Tokenizes the corpus, and prints its statistics or, if `show` has numbers of training samples, these samples.

        The command `prepare` calls this method without a trainer.
        """
        self.check()
        prepared = shards.prepare(self.corpus, self.tokenizer_options, self.layout(), self.cache_dir)
        if show:
            inspection.print_samples(prepared, self.block_size, show)
        else:
            inspection.print_counts(prepared, self.block_size, omitted=1)

    def setup(self, stage: str) -> None:
        """Opens the shards, in each process."""
        self.check()
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        self.prepared = shards.prepare(self.corpus, self.tokenizer_options, self.layout(), self.cache_dir)
        self.tokenizer = self.prepared.tokenizer
        self.splits = {name: self.prepared.split(name) for name in shards.SPLITS}
        needed = {"fit": ["train", "validation"], "validate": ["validation"], "test": ["test"], "predict": ["test"]}
        for name in needed[stage]:
            if name == "validation" and not self.trainer.limit_val_batches:
                continue
            remedy = "lower --data.block_size, give more text or "
            if name == "train":
                remedy += "a larger share of it"
            elif getattr(self.corpus, f"{name}_paths"):
                remedy += f"name other files with --data.corpus.{name}_paths"
            else:
                remedy += f"increase --data.corpus.{name}_fraction (or give files with --data.corpus.{name}_paths)"
            shards.require_full_block(self.splits[name], name, self.block_size, remedy)
            if self.trainer.is_global_zero:
                self.report(name)

    def report(self, name: str) -> None:
        """Prints the size of a split, and how much of it is not used."""
        split, blocks = self.splits[name], self.samples(name)
        left = len(split.tokens) - 1 - len(blocks) * self.block_size  # one token less, as the first is not a target
        print(
            f"{name}: {len(split.documents):,} documents, {split.bytes:,} bytes, {len(split.tokens):,} tokens of "
            f"{len(self.tokenizer):,} kinds, unigram perplexity {split.unigram_perplexity:.1f}, {len(blocks):,} blocks "
            f"of {self.block_size}"
            + (f", {left} tokens at the end are not used, as they do not fill a block" if left > 0 else "")
            + self.prepared.about_unknown(name)
        )

    def samples(self, split: str) -> Any:
        seed = self.seed if split == "train" else None
        return Blocks(self.splits[split], self.block_size, self.mask_documents, seed)

    @property
    def info(self) -> dict:
        return self.prepared.info

    def identity(self) -> dict:
        """Settings that determine the stream of samples; a position in it can be resumed only if they are equal."""
        return {
            "corpus and tokenizer": self.prepared.folder.name,
            "data.block_size": self.block_size,
            "seed_everything": self.seed,
        }
