"""Examples: tokenized rows with targets, in an order that needs little padding, and their batches."""

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from lm_lightning.data.order import PADDING, samples_at, shuffle

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

INPUTS = ("input_ids", "token_type_ids", "attention_mask")  # keys that tokenizers return and networks accept


class Examples(Dataset):
    """Tokenized examples with targets.

    Args:
        rows: For each example, the tokenizer's output (`input_ids` and others, lists of the same length), and its
            targets, tensors with any keys, such as `targets`.
        seed: Seed of the order of training epochs. None for evaluation: each row once, in `order`, the longest first.

    Items are those rows with `id`, the number of the row. In rows that only pad a batch, all targets are ignored: -100,
    or NaN if targets are floating-point numbers.
    """

    def __init__(self, rows: Sequence[dict], seed: Optional[int]) -> None:
        self.rows, self.seed = rows, seed
        known = getattr(rows, "lengths", None)
        lengths = [len(row["input_ids"]) for row in rows] if known is None else known
        self.lengths = np.array(lengths, dtype=np.int64)
        self.longest_first = np.argsort(-self.lengths, kind="stable")
        self.order = self.longest_first

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> dict:
        if position == PADDING:
            shortest = self.rows[self.longest_first[-1]]
            ignored = {name: ignored_like(v) for name, v in shortest.items() if isinstance(v, torch.Tensor)}
            return shortest | ignored | {"id": PADDING}
        order = self.order if self.seed is None else self.epoch(position // len(self))
        row = int(order[position % len(self)])
        return self.rows[row] | {"id": row}

    @functools.lru_cache(maxsize=2)  # noqa: B019 (as long-lived as the run)
    def epoch(self, number: int) -> np.ndarray:
        """The order of an epoch: rows of similar lengths together."""
        positions = np.arange(number * len(self), (number + 1) * len(self))
        seed = self.seed or 0
        return by_length(samples_at(positions, len(self), seed), self.lengths, seed + number, number * len(self))


def ignored_like(target: torch.Tensor) -> torch.Tensor:
    """A target of the same shape that the loss ignores: -100, or NaN if it is a floating-point number."""
    return torch.full_like(target, math.nan if target.is_floating_point() else -100)


def collate(tokenizer: "PreTrainedTokenizerFast", items: list[dict]) -> dict:
    """Collates examples to a batch, padded to the longest one.

    Returns:
        The tokenizer's output (`input_ids` and others), (B, T) int64; the targets, (B, ...), padded with ignored ones
        if their lengths differ; `id`, a list of B numbers.
    """
    multiple = 8 if torch.cuda.is_available() else None  # tensor cores need multiples of 8, CPUs do not
    targets = [key for key, value in items[0].items() if isinstance(value, torch.Tensor)]
    encodings = [{key: item[key] for key in item if key not in ("id", *targets)} for item in items]
    batch = dict(tokenizer.pad(encodings, pad_to_multiple_of=multiple, return_tensors="pt"))
    for key in targets:
        values = [item[key] for item in items]
        fill = ignored_like(values[0].new_zeros(())).item()
        batch[key] = pad_sequence(values, True, fill) if values[0].ndim else torch.stack(values)
    return batch | {"id": [item["id"] for item in items]}


def network_inputs(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The inputs of the network in a batch, (B, T) int64 each, without targets and other keys of the task."""
    return {name: batch[name] for name in INPUTS if name in batch}


def by_length(
    order: np.ndarray, lengths: np.ndarray, seed: int, begin: int = 0, chunk: int = 4096, run: int = 64
) -> np.ndarray:
    """Reorders an epoch so that neighboring samples have similar lengths and batches need little padding.

    The epoch is cut into chunks, each chunk is sorted by length and cut into runs, and the runs are shuffled. Samples
    of a run stay together; apart from that, the order is random. It depends only on the arguments, not on the size of
    batches.

    Runs begin at multiples of their size in the stream of all epochs, since batches also begin there. Thus, an epoch
    may begin or end in the middle of a run: there it has its shortest samples, and so does the neighboring epoch.

    Args:
        order: Samples of the epoch in random order, (N,) int64.
        lengths: Length of each sample by its number.
        seed: Seed for shuffling the runs; different for each epoch.
        begin: Position of the epoch in the stream.
        chunk: Number of samples that are sorted together.
        run: Number of samples that stay together.

    Returns:
        The same samples, (N,) int64.
    """
    parts: list[np.ndarray] = []
    for start in range(0, len(order), chunk):
        part = order[start : start + chunk]
        part = part[np.argsort(lengths[part], kind="stable")]
        head = min(-(begin + start) % run, len(part))
        tail = (len(part) - head) % run
        runs = part[head + tail :].reshape(-1, run)
        places = np.argsort(shuffle(np.arange(len(runs)), len(runs), seed + start))
        parts += [part[:head], runs[places].ravel(), part[head : head + tail]]
    return np.concatenate(parts)
