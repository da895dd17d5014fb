"""The contract of data modules: what models, callbacks and commands read from `trainer.datamodule` and its batches.

Any `LightningDataModule` can be used, as in `--data my_package.MyData`; a base class of this project is not needed. Its
batches are dicts. A `CausalLM` needs two keys:

input_ids       (B, T) int64: input tokens.
targets         (B, T) int64: the next token at each position, -100 where none is to be predicted. (They are already
                shifted, unlike the `labels` of transformers.)

and uses the following ones if they exist:

attention_mask  (B, T) int64: 1 for tokens, 0 for padding.
position_ids    (B, T) int64: positions; they restart at 0 for each packed document.
id              list of B ints, not a tensor: the index in the split of each row's sample, -1 (`order.PADDING`) for a
                row that only pads the last batch. Without ids, messages about spikes and non-finite losses do not
                name samples, and predictions are numbered in the order of the batches.

corpus          list of B equal strings, in evaluation: the corpus of a mixture from which the batch is; the mean loss
                of each corpus is then also logged.

The docstring of each other model's `loss` describes its batches. Callbacks read only `input_ids`, `targets` and `id`.

`DataModule` lists all attributes that are read. Each is optional and has a default in `DEFAULTS`, which `optional`
returns for a data module without the attribute.

A checkpoint contains the data module's `state_dict()`, and Lightning also restores dataloaders that have one (such as
torchdata's `StatefulDataLoader`). A run that is resumed in the middle of an epoch continues with the next samples only
if one of them restores the position; a plain `DataLoader` starts again from its first batch. `StreamData` restores the
position exactly.

If there are several processes, each must read different samples. A plain `DataLoader` does so with
`--trainer.use_distributed_sampler true`, and is refused without it; an `IterableDataset` or a batch sampler must
distribute the samples itself, see `place`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Optional, Protocol

from lm_lightning.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from lightning.pytorch import Trainer
    from transformers import PreTrainedTokenizerFast


class SplitSize(Protocol):
    """The size of a split.

    Attributes:
        tokens: All tokens of the split, a sized collection; all except the first are targets.
        bytes: Number of UTF-8 bytes of its text.
    """

    tokens: Any
    bytes: int


class DataModule(Protocol):
    """The attributes that are read from a data module, in addition to Lightning's own. All are optional.

    Attributes:
        tokenizer: Tokenizer that is saved in the run folder, in checkpoints (as a fingerprint) and with exports, and
            that determines the vocabulary size and special tokens of a new network. Without it, `model.network` must
            have `vocab_size`, exports have no tokenizer, and `Samples` and `predict` write no text.
        block_size: Number of tokens of the longest sample. Without it, a sample that is too long for the network is
            reported by the network itself.
        length_option: The option that sets `block_size`, for messages.
        batch_size: Number of samples per micro-batch and process. Without it, a run that is resumed in the middle of an
            epoch with another batch size does not convert its position in the epoch.
        tokens_per_batch: Number of targets of a typical micro-batch. Each micro-batch's loss is divided by it so that
            values stay near 1, which float16 needs; it does not affect the result. Default: 1.
        consumed: Number of samples that finished optimizer steps have used, over all processes. The model increases it
            after each step; `state_dict` may save it. Where the batches of a step may differ in size, a method
            `advance(rows)` increases it instead; `rows` is the number of this process's samples of the step.
        splits: Size of each split, by `train`, `validation` and `test`. Without it, there is no `bits_per_byte`.
        corpus_sizes: For each split, the size of each corpus of a mixture, by its name. With it, the losses of the
            corpora are announced as metrics, and have bits per byte.
        mixture: The training samples of a mixture, a `mixed_samples.MixedStream`; how many of each corpus were used is
            logged. None for a single corpus.
        token_counts: How often each token occurs in the training data, (tokens,) numbers of numpy. With it, the
            predictions of a new network start at these frequencies.
        mask_documents: Whether `position_ids` separate packed documents; the network is then checked for support.
        end_tokens: Tokens that end a generated text, such as the end of a turn. Exports of networks that generate text
            have them in `generation_config.json`, beside those that the network had.
        labels: Names of the labels in the order of their numbers, for models that predict labels.
        info: Origin and number of the samples, JSON-serializable, for `data.json` in the run folder and
            `evaluation.json`. Without it, these files do not describe the data.
        predict_table: Whether the rows to predict come from a table, so that predictions are also written as a table.
        inputs: The rows of that table: mappings of column names to values.
    """

    tokenizer: "Optional[PreTrainedTokenizerFast]"
    block_size: Optional[int]
    length_option: str
    batch_size: Optional[int]
    tokens_per_batch: int
    consumed: Optional[int]
    splits: Mapping[str, SplitSize]
    corpus_sizes: Mapping[str, Mapping[str, SplitSize]]
    mixture: Any
    token_counts: "Optional[np.ndarray]"
    mask_documents: bool
    end_tokens: list[int]
    labels: list[str]
    info: Optional[dict[str, Any]]
    predict_table: bool
    inputs: list[Mapping[str, Any]]


DEFAULTS: dict[str, Any] = {
    "tokenizer": None,
    "block_size": None,
    "length_option": "block_size",
    "batch_size": None,
    "tokens_per_batch": 1,
    "consumed": None,
    "splits": {},
    "corpus_sizes": {},
    "mixture": None,
    "token_counts": None,
    "mask_documents": False,
    "end_tokens": [],
    "labels": [],
    "info": None,
    "predict_table": False,
    "inputs": [],
}


def optional(data: Any, name: str) -> Any:
    """An attribute of a data module, or its default if the data module does not have it.

    Args:
        data: The data module.
        name: One of `DEFAULTS`.
    """
    return getattr(data, name, DEFAULTS[name])


def tokenizer_of(data: Any) -> "Optional[PreTrainedTokenizerFast]":
    """The tokenizer of a data module; None if it has none.

    Raises:
        UserError: If its attribute `tokenizer` is not a fast tokenizer.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = optional(data, "tokenizer")
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"the tokenizer of {type(data).__name__} is a {type(tokenizer).__name__}, but must be a fast tokenizer of "
            "transformers (AutoTokenizer), or None"
        )
    return tokenizer


def place(trainer: "Trainer") -> dict[str, int]:
    """The number of different micro-batches of a step, `num_replicas`, and the index of this process's, `rank`.

    With tensor parallelism, several processes work on the same micro-batch.
    """
    return getattr(trainer.strategy, "distributed_sampler_kwargs", {"num_replicas": 1, "rank": 0})


def sample_ids(batch: Mapping[str, Any]) -> list[int]:
    """The ids of the samples of a batch; empty if it has none."""
    return list(batch.get("id", []))


def corpus_of(batch: Mapping[str, Any]) -> Optional[str]:
    """The corpus of a batch of evaluation; None if the data has no corpora."""
    return batch["corpus"][0] if isinstance(batch, Mapping) and batch.get("corpus") else None


def rows(batch: Mapping[str, Any]) -> int:
    """The number of samples of a batch."""
    return len(batch["input_ids"])


def check_batch(batch: Any, data: Any, vocab_size: int) -> None:
    """Refuses a batch that is not a dict with `input_ids` and `targets`, or has tokens outside of the vocabulary.

    Args:
        batch: The batch.
        data: The data module.
        vocab_size: Size of the network's vocabulary.

    Raises:
        UserError: States what is wrong.
    """
    name = type(data).__name__
    found = f"with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else f"of type {type(batch).__name__}"
    if not isinstance(batch, Mapping) or not {"input_ids", "targets"} <= batch.keys():
        raise UserError(
            f"{name} yields batches {found}, but must yield dicts with input_ids and targets, see "
            "lm_lightning/data/contract.py"
        )
    if optional(data, "tokenizer") is None and (largest := int(batch["input_ids"].max())) >= vocab_size:
        raise UserError(
            f"{name} yields the token {largest}, but the vocab_size of the network is {vocab_size}: increase vocab_size"
        )


def check_loader(trainer: "Trainer") -> None:
    """Refuses a training dataloader that would read the same samples in each process.

    Raises:
        UserError: Names the option that distributes them.
    """
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

    loader = trainer.train_dataloader
    plain = isinstance(loader, DataLoader) and type(loader.batch_sampler) is BatchSampler
    if place(trainer)["num_replicas"] > 1 and plain and isinstance(loader.sampler, (RandomSampler, SequentialSampler)):
        raise UserError(
            f"all processes would read the same samples of {type(trainer.datamodule).__name__}: add "
            "--trainer.use_distributed_sampler true"
        )
