"""Pairs of texts: a source, from which a network writes the target."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
import torch
from torch.utils.data import DataLoader

from lm_lightning.data import cache as cached
from lm_lightning.data.reading import ReadReport
from lm_lightning.data.tokenizer import load, train
from lm_lightning.errors import UserError
from lm_lightning.finetuning import encoding
from lm_lightning.finetuning.counts import Counts, count_phrase
from lm_lightning.finetuning.data import LabelledData, padded
from lm_lightning.finetuning.examples import Examples
from lm_lightning.finetuning.store import sizes
from lm_lightning.finetuning.tables import Row, check_fraction, part
from lm_lightning.finetuning.token_batches import TokenBatches, TokenBatchSampler, TokenEvaluationBatches
from lm_lightning.tasks.seq2seq.parallel import PREFIX, Parallel, read_parallel
from lm_lightning.tasks.seq2seq.tokens import with_languages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass
class Seq2SeqColumns:
    """Names of the columns.

    Args:
        source: The text that is read. Lists of texts, such as sentences, are joined by spaces.
        target: The text that is to be written. A list has several correct texts: each is an example in training, and
            all are references in evaluations. Rows to predict do not need it.
    """

    source: str = "source"
    target: str = "target"


class PairExamples(Examples):
    """Tokenized pairs.

    Args:
        rows: See `Examples`.
        seed: See `Examples`.
        max_tokens: Tokens of a batch; None for batches with a number of rows.

    Attributes:
        pair_lengths: Tokens of each source and target, (N, 2) int64.
        batches: The batches of training, if they have a number of tokens.
    """

    def __init__(self, rows: Sequence[dict], seed: Optional[int], max_tokens: Optional[int]) -> None:
        super().__init__(rows, seed)
        self.pair_lengths = np.stack([self.lengths, sizes(rows, "targets")], axis=1)
        self.longest_first = np.lexsort(self.pair_lengths.T[::-1])[::-1]
        self.order = self.longest_first
        training = max_tokens is not None and seed is not None
        self.batches = TokenBatches(self.pair_lengths, max_tokens or 0, seed or 0) if training else None

    @functools.lru_cache(maxsize=2)  # noqa: B019 (as long-lived as the run)
    def epoch(self, number: int) -> np.ndarray:
        """The order of an epoch, in which batches are contiguous."""
        return super().epoch(number) if self.batches is None else self.batches.epoch(number).order


class Seq2SeqData(LabelledData):
    """Pairs of texts, in tables or in parallel files, tokenized for encoder-decoders.

    Without `tokenizer.path`, a new network gets a vocabulary that is trained on sources and targets together. Training
    rows without a source or a target are omitted; their number is printed.

    Args:
        columns: Names of the tables' columns.
        parallel: Text files instead of tables.
        max_target_length: Maximum number of tokens of a target, including its end; longer ones are truncated in
            training and in the loss, without an end, so that the network does not learn to end there. Scores use the
            full text.
        max_tokens: Maximum number of tokens of a micro-batch of each process, sources and targets together, padding
            included: `batch_size` then is not used, and a micro-batch has as many rows of similar lengths as fit.
        source_language: Language of the sources, for tokenizers that mark it, such as `de_DE` (mBART).
        target_language: The same for the targets.
        options: Options of all labelled data, see `LabelledData`; `max_length` is the maximum number of tokens of a
            source.
    """

    not_encoded = LabelledData.not_encoded | {"parallel", "max_tokens", "length_option"}

    def __init__(
        self,
        columns: Seq2SeqColumns = Seq2SeqColumns(),
        parallel: Parallel = Parallel(),
        max_target_length: int = 128,
        max_tokens: Optional[int] = None,
        source_language: Optional[str] = None,
        target_language: Optional[str] = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.columns, self.parallel, self.max_tokens = columns, parallel, max_tokens
        self.max_source_length, self.max_target_length = self.block_size, max_target_length
        self.block_size = max(self.max_source_length, max_target_length)
        if max_target_length > self.max_source_length:
            self.length_option = "max_target_length"
        self.source_language, self.target_language = source_language, target_language

    # Setup

    def check(self) -> None:
        for name, value, least in (
            ("max_length", self.max_source_length, 2),
            ("max_target_length", self.max_target_length, 2),
            ("max_tokens", self.max_tokens, 4),
        ):
            if value is not None and value < least:
                raise UserError(f"data.{name} is {value}, but must be {least} or more")
        if self.parallel.given() and (self.tables.train or self.tables.validation or self.tables.test):
            raise UserError("give files with data.parallel or data.tables, not with both")
        if self.trainer.state.fn == "fit" and not (self.parallel.given() or self.tables.train or self.tables.hub):
            raise UserError(
                "there is no training data: give parallel files with --data.parallel.train '[SOURCES, TARGETS]', or "
                "tables with --data.tables.train"
            )
        self.tokenizer_options.check()
        if self.tokenizer_options.path is not None or self.trainer.state.fn != "fit":
            super().check()

    def load_tokenizer(self) -> "PreTrainedTokenizerFast":
        path = self.tokenizer_options.path
        if path is None:
            if language := self.source_language or self.target_language:
                raise UserError(f"a new tokenizer has no languages, but data has {language}: omit it")
            self.print("tokenizer: trained on the sources and targets of the training split")
            folder = cached.folder_of(self.cache_dir)
            own = folder / "tokenizers" / encoding.key(self, "train", "seq2seq", vars(self.tokenizer_options))

            def make(partial: Path) -> None:
                train(self.tokenizer_options, self.training_texts(), "seq2seq").save_pretrained(partial)

            cached.make_once(own, folder, "training the tokenizer", make)
            return load(str(own))
        tokenizer = load(path)
        if languages := with_languages(tokenizer, self.source_language, self.target_language):
            tokenizer = load(path, **languages)
        return padded(tokenizer)

    def training_texts(self) -> Iterator[str]:
        """All texts of the training split."""
        for row in encoding.progress(self, "train", ReadReport(), "train tokenizer"):
            if self.is_complete(row):
                yield self.source(row)
                yield from self.targets(row)

    def make_examples(self, split: str, rows: Sequence[dict]) -> PairExamples:
        examples = PairExamples(rows, self.seed if split == "train" else None, self.max_tokens)
        if self.max_tokens is not None and (longest := int(examples.pair_lengths.sum(1).max())) > self.max_tokens:
            raise UserError(
                f"data.max_tokens is {self.max_tokens}, but a row of the {split} split has {longest} tokens: increase "
                "it, or lower data.max_length and data.max_target_length"
            )
        return examples

    @property
    def tokens_per_batch(self) -> int:
        return self.batch_size * 32 if self.max_tokens is None else max(1, self.max_tokens // 2)

    # Rows

    def key(self, row: Row) -> str:
        return self.source(row)

    def read(self, split: str, report: ReadReport) -> Iterator[Row]:
        if not self.parallel.given():
            yield from super().read(split, report)
            return
        check_fraction(self.tables)
        names, files = (self.columns.source, self.columns.target), self.parallel.files(split)
        rows = read_parallel(files, names, self.tables, report)
        first = next(rows, None)
        if first is None:
            raise UserError(f"the {split} split has no rows, as {files[0]} is empty: give other files")
        rows = itertools.chain([first], rows)
        if split in ("train", "validation") and not self.parallel.validation:
            rows = part(rows, split, self.key, self.tables.validation_fraction, PREFIX)
        yield from rows

    def files(self, split: str) -> list[Path]:
        return self.parallel.files(split) if self.parallel.given() else super().files(split)

    def hub_content(self, split: str, folder: Path) -> list[str]:
        return [] if self.parallel.given() else super().hub_content(split, folder)

    def holds_out(self) -> bool:
        return not (self.parallel.validation if self.parallel.given() else self.tables.validation)

    def is_complete(self, row: Row) -> bool:
        """Whether a row has a source and a target."""
        return bool(self.source(row).strip()) and all(text.strip() for text in self.targets(row))

    def source(self, row: Row) -> str:
        """The source of a row; it may be empty."""
        return " ".join(self.texts(row, self.columns.source))

    def targets(self, row: Row) -> list[str]:
        """The correct texts of a row, at least one; they may be empty."""
        return self.texts(row, self.columns.target) or [""]

    def texts(self, row: Row, column: str) -> list[str]:
        """The text or the list of texts in a column.

        Raises:
            UserError: If it is neither.
        """
        value = row.value(column)
        texts = value if isinstance(value, list) else ["" if value is None else value]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(
                f"{row.where}: column {column!r} is {value!r:.40}, but must be a text or a list of texts: fix or "
                "remove the row"
            )
        return texts

    # Tokens

    def encoding_options(self, split: str) -> Any:
        return self.trainer.lightning_module.decoder_tokens()

    def encode(self, split: str, rows: list[Row]) -> list[dict]:
        """Has `notes` in evaluations: the source, and the correct texts."""
        if split == "train":
            complete = [row for row in rows if self.is_complete(row)]
            self.counts.add("incomplete", len(rows) - len(complete))
            rows = complete
        sources = [self.source(row) for row in rows]
        targets = [[""] if split == "predict" else self.targets(row) for row in rows]
        if split == "train":
            sources = [source for source, texts in zip(sources, targets) for _ in texts]
            targets = [[text] for texts in targets for text in texts]
        if not rows:
            return []
        encoded = self.tokenizer(
            sources,
            return_attention_mask=False,
            return_token_type_ids=False,
            truncation=True,
            max_length=self.max_source_length,
        )
        ids = self.target_ids([texts[0] for texts in targets])
        limit = self.max_target_length
        examples: list[dict[str, Any]] = [
            {"input_ids": source, "targets": torch.tensor(target[:limit])}
            for source, target in zip(encoded["input_ids"], ids)
        ]
        if split != "train":
            examples = [example | {"notes": pair} for example, pair in zip(examples, zip(sources, targets))]
        self.count_tokens(examples, sum(bool(encoding.overflowing) for encoding in encoded.encodings), sources)
        self.counts.add("target tokens", sum(len(example["targets"]) for example in examples))
        self.counts.add("truncated targets", sum(len(target) > limit for target in ids))
        return examples

    def check_counts(self, split: str, counts: Counts) -> None:
        if counts["incomplete"] == counts["rows"]:
            raise UserError("no row of the training split has both a source and a target: give other files")

    def report(self, split: str, examples: Examples, counts: Counts) -> None:
        if incomplete := counts["incomplete"]:
            self.print(f"train: {incomplete:,} rows without a source or a target are omitted")
        super().report(split, examples, counts)
        if split != "predict":
            cut = count_phrase(counts["truncated targets"], "are truncated")
            self.print(f"{split}: targets with {counts['target tokens']:,} tokens{cut}")

    def target_ids(self, texts: list[str]) -> list[list[int]]:
        """The tokens of targets, with those that the decoder writes around them."""
        tokens = self.trainer.lightning_module.decoder_tokens()
        encoded = self.tokenizer(text_target=texts, add_special_tokens=False, return_attention_mask=False)
        return [[*tokens.prefix, *ids, tokens.end] for ids in encoded["input_ids"]]

    # Batches

    def train_dataloader(self) -> DataLoader:
        samples: Any = self.samples("train")
        if samples.batches is None:
            return super().train_dataloader()
        sampler = TokenBatchSampler(
            samples.batches, self.trainer.accumulate_grad_batches, self.replica, self.replicas, lambda: self.consumed
        )
        self.repeated = 0
        if overfit := self.trainer.overfit_batches:  # each epoch reads the first batches again
            number = min(overfit, len(sampler)) if isinstance(overfit, int) else int(overfit * len(sampler))
            batches = samples.batches.after(0)
            self.repeated = [next(batches) for _ in range(max(1, number) * self.replicas)][-1].stop
            sampler.consumed = lambda: self.consumed % self.repeated
        return self.loader(samples, sampler)

    def advance(self, rows: int) -> None:
        batches = getattr(self.examples["train"], "batches", None)
        if batches is None:
            super().advance(rows)
            return
        position = self.consumed % self.repeated if self.repeated else self.consumed
        following = batches.after(position)
        used = [next(following) for _ in range(self.trainer.accumulate_grad_batches * self.replicas)]
        self.consumed += used[-1].stop - position

    def evaluation_loader(self, split: str) -> DataLoader:
        if self.max_tokens is None:
            return super().evaluation_loader(split)
        samples: Any = self.samples(split)
        lengths = samples.pair_lengths[samples.order]
        return self.loader(samples, TokenEvaluationBatches(lengths, self.max_tokens, self.replica, self.replicas))

    # Description

    @property
    def info(self) -> dict:
        return super().info | ({"parallel": asdict(self.parallel)} if self.parallel.given() else {})

    @property
    def predict_table(self) -> bool:
        return not self.parallel.given() and super().predict_table

    def identity(self) -> dict:
        return super().identity() | {"data.max_tokens": self.max_tokens}
