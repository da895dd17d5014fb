"""Data of pretraining: cuts the tokens of the shards into full blocks.

The documents of a split are concatenated to one sequence of tokens, each followed by the end-of-text token. Block `i`
consists of tokens [i·T, i·T + T], so that the inputs, and the targets, which are the inputs shifted by one, have T
tokens each, and every token of the split is a target once. There is no padding.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Optional, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lm_lightning.data import cache, inspection, shards
from lm_lightning.data.corpus import Corpus
from lm_lightning.data.interleaving import Stage
from lm_lightning.data.mixed_samples import MixedBatches, MixedEvaluation, MixedStream, Past, plan
from lm_lightning.data.mixture import (
    MixedCorpus,
    MixtureStage,
    PreparedMixture,
    joined_size,
    labelled,
    mixture_options,
    train_tokens,
)
from lm_lightning.data.order import PADDING, samples_at, seed_of, sequence_key
from lm_lightning.data.stream import StreamData
from lm_lightning.data.tokenizer import Tokenizer
from lm_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


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

    def __getitems__(self, positions: list[int]) -> list[dict]:
        """Several items; computing their places in the shuffled order together takes less time."""
        samples = positions
        if self.seed is not None:
            samples = samples_at(np.array(positions), self.size, self.seed).tolist()
        return [self[PADDING] if position == PADDING else self.block(n) for position, n in zip(positions, samples)]

    def __getitem__(self, position: int) -> dict:
        if position == PADDING:
            item = self[0]
            item["targets"] = torch.full_like(item["targets"], -100)
            return item | {"id": PADDING}
        return self.block(
            position if self.seed is None else int(samples_at(np.array([position]), self.size, self.seed)[0])
        )

    def block(self, sample: int) -> dict:
        """The item of a sample of the split."""
        start = min(sample * self.block_size, len(self.split.tokens) - 1 - self.block_size)
        row = torch.from_numpy(self.split.tokens[start : start + self.block_size + 1].astype(np.int64))
        item: dict = {"input_ids": row[:-1], "targets": row[1:].clone(), "id": sample}
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
    """Stacks items to a batch: tensors (B, T), and `id` and `corpus` as lists, which stay on the CPU."""
    lists = {key: [item[key] for item in items] for key in ("id", "corpus") if key in items[0]}
    return {key: torch.stack([item[key] for item in items]) for key in items[0] if key not in lists} | lists


class PretrainingData(StreamData):
    """Packed blocks of a corpus, or of a mixture of corpora, for causal language modeling.

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
        corpora: Optional[dict[str, MixedCorpus]] = None,
        temperature: Optional[float] = None,
        stages: Sequence[MixtureStage] = (),
        block_size: int = 256,
        batch_size: int = 16,
        mask_documents: bool = False,
        num_workers: int = 0,
        cache_dir: str = cache.DEFAULT,
    ) -> None:
        super().__init__()
        self.options = mixture_options(corpus, corpora, temperature, stages)
        self.corpora = {"": corpus} if self.options is None else self.options.corpora
        self.tokenizer_options = tokenizer
        self.block_size, self.batch_size, self.mask_documents = block_size, batch_size, mask_documents
        self.num_workers, self.cache_dir = num_workers, cache_dir
        self.mixture: Optional[MixedStream] = None  # the training samples of a mixture, once they exist
        self.past = Past()

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

    def prepare_all(self) -> dict[str, shards.Prepared]:
        """Tokenizes the corpora, unless the cache has them; a single corpus has the name ""."""
        self.check()
        return shards.prepare_all(self.corpora, self.tokenizer_options, self.layout(), self.cache_dir)

    def prepare_data(self) -> None:
        self.prepare_all()

    def prepare_corpus(self, show: Sequence[int] = ()) -> None:
        """Tokenizes the corpus, and prints its statistics or, if `show` has numbers of training samples, these samples.

        The command `prepare` calls this method without a trainer.
        """
        prepared = self.prepare_all()
        if show:
            inspection.print_samples(prepared, self.sample_tokens(next(iter(prepared.values())).tokenizer), show)
        else:
            self.print_counts(prepared)

    def print_counts(self, prepared: dict[str, shards.Prepared]) -> None:
        """Prints the sizes of the corpora."""
        inspection.print_counts(prepared, self.block_size, omitted=1)
        self.print_shares(prepared)

    def print_shares(self, prepared: dict[str, shards.Prepared]) -> None:
        """Prints the shares of the corpora of a mixture."""
        if self.options is not None:
            print("\n".join(self.options.describe(train_tokens(prepared))))

    def sample_tokens(self, tokenizer: "PreTrainedTokenizerFast") -> int:
        """Number of tokens of a sample, without special tokens that the samples add."""
        return self.block_size

    def setup(self, stage: str) -> None:
        """Opens the shards, in each process."""
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        parts = self.prepare_all()
        self.tokenizer = next(iter(parts.values())).tokenizer
        self.opened = {split: {name: part.split(split) for name, part in parts.items()} for split in shards.SPLITS}
        self.prepared: Any
        if self.options is None:
            self.prepared = parts[""]
            self.splits: Any = {split: opened[""] for split, opened in self.opened.items()}
        else:
            self.prepared = PreparedMixture(parts, self.options)
            self.splits = {
                split: joined_size([self.opened[split][name] for name in self.used(split)]) for split in shards.SPLITS
            }
        needed = {"fit": ["train", "validation"], "validate": ["validation"], "test": ["test"], "predict": ["test"]}
        for split in needed[stage]:
            if split == "validation" and not self.trainer.limit_val_batches:
                continue
            if not self.used(split):
                raise UserError(
                    f"no corpus has documents for the {split} split: set {split}_fraction or {split}_paths of one of "
                    "data.corpora"
                )
            for name in self.used(split):
                self.require_samples(split, name)
                if self.trainer.is_global_zero:
                    self.report(split, name)

    def used(self, split: str) -> list[str]:
        """The names of the corpora whose split is used."""
        return [""] if self.options is None else self.options.used(split)

    def require_samples(self, split: str, name: str) -> None:
        """Refuses a split of a corpus that does not fill a block."""
        corpus = self.corpora[name]
        remedy = "lower --data.block_size, give more text or "
        if split == "train":
            remedy += "a larger share of it"
        elif getattr(corpus, f"{split}_paths"):
            remedy += f"name other files with {corpus.prefix}.{split}_paths"
        else:
            remedy += f"increase {corpus.prefix}.{split}_fraction (or give files with {corpus.prefix}.{split}_paths)"
        shards.require_full_block(self.opened[split][name], labelled(split, name), self.block_size, remedy)

    def report(self, split: str, corpus: str) -> None:
        """Prints the size of a split of a corpus, and how much of it is not used."""
        opened, blocks = self.opened[split][corpus], self.corpus_samples(split, corpus)
        left = len(opened.tokens) - 1 - len(blocks) * self.block_size  # one token less, as the first is not a target
        prepared = self.prepared if self.options is None else self.prepared.parts[corpus]
        print(
            f"{labelled(split, corpus)}: {len(opened.documents):,} documents, {opened.bytes:,} bytes, "
            f"{len(opened.tokens):,} tokens of {len(self.tokenizer):,} kinds, "
            f"unigram perplexity {opened.unigram_perplexity:.1f}, {len(blocks):,} blocks of {self.block_size}"
            + (f", {left} tokens at the end are not used, as they do not fill a block" if left > 0 else "")
            + prepared.about_unknown(split)
        )

    def corpus_samples(self, split: str, corpus: str) -> Any:
        """The samples of a split of a corpus."""
        return Blocks(self.opened[split][corpus], self.block_size, self.mask_documents, self.order_seed(split, corpus))

    def order_seed(self, split: str, corpus: str) -> Optional[int]:
        """The seed of the order of the training samples of a corpus; None for other splits, which have no order."""
        if split != "train":
            return None
        return self.seed if self.options is None else seed_of(self.seed, sequence_key(list(corpus.encode())))

    def samples(self, split: str) -> Any:
        if self.options is None:
            return self.corpus_samples(split, "")
        size = self.sample_tokens(self.tokenizer)
        parts = {name: self.corpus_samples(split, name) for name in self.used(split)}
        first_ids = inspection.first_ids({name: len(part.tokens) for name, part in self.opened[split].items()}, size)
        if split != "train":
            return MixedEvaluation(parts, first_ids)
        length, names = sum(map(len, parts.values())), self.options.names
        tokens = train_tokens(self.prepared.parts)
        interleaving, end = plan(self.options, tokens, self.trainer, self.batch_size, length, self.past)
        ids = [first_ids[name] for name in names]
        return MixedStream(names, list(map(parts.get, names)), ids, interleaving, self.block_size, end)

    def train_dataloader(self) -> DataLoader:
        loader = super().train_dataloader()
        if self.options is not None:
            self.mixture = cast(MixedStream, loader.dataset)
        return loader

    def evaluation_loader(self, split: str) -> DataLoader:
        if self.options is None:
            return super().evaluation_loader(split)
        samples = self.samples(split)
        sizes = {name: len(part) for name, part in samples.parts.items()}
        return self.loader(samples, MixedBatches(sizes, self.batch_size, self.replica, self.replicas))

    @property
    def corpus_sizes(self) -> dict[str, dict[str, shards.Split]]:
        """The size of each corpus of a mixture, by split; empty without a mixture."""
        if self.options is None:
            return {}
        return {split: {name: self.opened[split][name] for name in self.used(split)} for split in self.opened}

    def used_samples(self) -> dict[str, dict[str, float]]:
        """The training samples of each corpus of a mixture so far: their `tokens`, `epochs` and `share`."""
        return self.mixture.seen(self.consumed, self.overfit_samples)  # type: ignore[union-attr]

    @property
    def info(self) -> dict:
        if self.mixture is None:
            return self.prepared.info
        return self.prepared.info | {"used": self.used_samples()}

    @property
    def token_counts(self) -> np.ndarray:
        """How often each token occurs in the training data, (tokens,)."""
        return self.prepared.frequencies()

    def identity(self) -> dict:
        """Settings that determine the stream of samples; a position in it can be resumed only if they are equal."""
        return {
            "corpus and tokenizer": self.prepared.folder.name,
            "data.block_size": self.block_size,
            "seed_everything": self.seed,
        }

    def state_dict(self) -> dict:
        state = super().state_dict()
        if self.mixture is not None:
            stages = [[stage.start, list(stage.counts)] for stage in self.mixture.interleaving.stages]
            state |= {"step": self.trainer.global_step, "stages": stages}
        return state

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        if self.options is not None and self.trainer.state.fn == "fit":
            stages = [Stage(start, tuple(counts)) for start, counts in state["stages"]]
            self.past = Past(state["consumed"], state["step"], stages)
