"""The contract of data modules: what models, callbacks and commands read from `trainer.datamodule` and its batches.

Any `LightningDataModule` can be used, `--data my_package.MyData`, without a base class of this project. Its batches are
dicts of tensors. A `CausalLM` needs two of them:

input_ids       (B, T) int64: tokens that the network reads.
targets         (B, T) int64: the token that follows at each position, -100 where none is to be predicted. (They are
                already shifted, unlike the `labels` of transformers.)

and uses, if they are there:

attention_mask  (B, T) int64: 1 for tokens, 0 for padding.
position_ids    (B, T) int64: positions; those of packed documents start again at 0.
id              list of B ints, not a tensor: which sample of the split each row is, -1 (`order.PADDING`) for a row that
                only fills up the last batch. Without ids, messages about spikes and non-finite losses name no samples,
                and predictions are numbered in the order of the batches.

Batches of other models are described at their `loss`. Callbacks read only `input_ids`, `targets` and `id`.

All attributes of the data module that are read are listed in `DataModule`. Each of them is optional and has a default
in `DEFAULTS`, which `optional` returns for a data module that does not have it.

A checkpoint has the data module's `state_dict()`, and Lightning also restores dataloaders that have one (such as
torchdata's `StatefulDataLoader`). A run resumed amid an epoch reads the samples that it would have read only if one of
them restores the position; a plain `DataLoader` starts again from its first batch. `StreamData` restores it exactly.

With several processes, each must read other samples: a plain `DataLoader` does so with
`--trainer.use_distributed_sampler true` and is refused without it; an `IterableDataset` or a batch sampler must do so
itself, see `place`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Optional, Protocol

from lm_lightning.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from transformers import PreTrainedTokenizerFast


class SplitSize(Protocol):
    """How much text a split has.

    Attributes:
        tokens: All tokens of the split, a sized collection; every one but the first is a target.
        bytes: UTF-8 bytes of its text.
    """

    tokens: Any
    bytes: int


class DataModule(Protocol):
    """What is read from a data module, beside Lightning's own methods. Everything is optional.

    Attributes:
        tokenizer: Is saved in the run folder, in checkpoints (as a fingerprint) and with exports, and gives a new
            network its vocabulary size and special tokens. Without it, `model.network` must have `vocab_size`, exports
            are networks without a tokenizer, and what writes text (`Samples`, `predict`) writes none.
        block_size: Tokens of the longest sample. Without it, a sample that is longer than the network's positions is an
            error of the network.
        length_option: The option that sets `block_size`, for messages.
        batch_size: Samples of a micro-batch of one process. Without it, a run resumed amid an epoch with another batch
            size does not convert its position in the epoch.
        tokens_per_batch: Number of targets of a typical micro-batch. Each micro-batch's loss is divided by it so that
            numbers stay near 1 (float16 needs that); it has no effect on the result. Without it: 1.
        consumed: Samples that finished optimizer steps have used, over all processes. The model increases it after each
            step; `state_dict` can save it.
        splits: Size of the text of each split, by `train`, `validation` and `test`. Without it, there is no
            `bits_per_byte`.
        mask_documents: Whether `position_ids` separate packed documents; the network is then checked for support.
        labels: Names of the labels in the order of their numbers, for models that predict labels.
        info: Where the samples come from and how many there are, JSON-able, for `data.json` in the run folder and
            `evaluation.json`. Without it, these have none.
        predict_table: Whether the rows to predict come from a table, so that predictions are written as one, too.
        inputs: The rows of that table: mappings of column names to values.
    """

    tokenizer: "Optional[PreTrainedTokenizerFast]"
    block_size: Optional[int]
    length_option: str
    batch_size: Optional[int]
    tokens_per_batch: int
    consumed: Optional[int]
    splits: Mapping[str, SplitSize]
    mask_documents: bool
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
    "mask_documents": False,
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
    """The tokenizer of a data module, None if it has none.

    Raises:
        UserError: If its attribute `tokenizer` is something else.
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
    """Which of the different micro-batches of a step is this process's: `num_replicas` and `rank`.

    With tensor parallelism, several processes work on the same micro-batch.
    """
    return getattr(trainer.strategy, "distributed_sampler_kwargs", {"num_replicas": 1, "rank": 0})


def sample_ids(batch: Mapping[str, Any]) -> list[int]:
    """The ids of the samples of a batch, empty if it has none."""
    return list(batch.get("id", []))


def rows(batch: Mapping[str, Any]) -> int:
    """How many samples a batch has."""
    return len(batch["input_ids"])


def check_batch(batch: Any, data: Any, vocab_size: int) -> None:
    """Refuses a batch that is no dict of `input_ids` and `targets`, or has tokens that the network does not have.

    Args:
        batch: The batch.
        data: The data module.
        vocab_size: Tokens of the network.

    Raises:
        UserError: Says what is wrong.
    """
    name = type(data).__name__
    found = f"with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else f"of type {type(batch).__name__}"
    if not isinstance(batch, Mapping) or not {"input_ids", "targets"} <= batch.keys():
        raise UserError(
            f"{name} yields batches {found}, but must yield dicts with input_ids and targets, see "
            "lm_lightning/data/contract.py"
        )
    if optional(data, "tokenizer") is None and (largest := int(batch["input_ids"].max())) >= vocab_size:
        raise UserError(f"{name} yields the token {largest}, but the network has {vocab_size}: raise its vocab_size")


def check_loader(trainer: "Trainer") -> None:
    """Refuses a dataloader of training that would read the same samples in each process.

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
