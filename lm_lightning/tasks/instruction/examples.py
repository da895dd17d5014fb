"""Tokenized conversations, alone or packed into rows of equal length, and their batches."""

from typing import Any

import numpy as np
import torch

from lm_lightning.finetuning.store import Store


class TokenizedConversations:
    """Conversations with their targets.

    Args:
        store: The `tokens` of each conversation, and which of them are targets, `is_target`, a bool tensor.

    Items are dicts of `input_ids` (T,) int64 array, all tokens except the last, and `targets` (T,) int64, the next
    token of each, -100 where it is not one of the assistant.
    """

    def __init__(self, store: Store) -> None:
        self.store, self.bounds = store, store.starts["tokens"]
        self.tokens, self.is_target = store.values["tokens"], store.values["is_target"]

    def __reduce__(self) -> tuple:  # a process to which it is sent maps the files itself
        return type(self), (self.store,)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, number: int) -> dict[str, Any]:
        begin, end = self.bounds[number], self.bounds[number + 1]
        ids = self.tokens[begin:end].astype(np.int64)
        targets = np.where(self.is_target[begin + 1 : end], ids[1:], -100)
        return {"input_ids": ids[:-1], "targets": torch.from_numpy(targets)}

    def question(self, number: int) -> tuple[list[int], list[int]]:
        """The ids before the last answer of a conversation, and those of that answer, without its end token."""
        begin, end = self.bounds[number], self.bounds[number + 1]
        ids, is_target = self.tokens[begin:end].tolist(), self.is_target[begin:end]
        start = int(np.flatnonzero(~is_target)[-1]) + 1
        return ids[:start], ids[start:-1]

    @property
    def lengths(self) -> np.ndarray:
        """Number of inputs of each conversation, (N,) int64."""
        return np.diff(self.bounds) - 1


class Questions(TokenizedConversations):
    """Conversations to be continued: all their tokens are inputs."""

    def __getitem__(self, number: int) -> dict[str, Any]:
        ids = self.tokens[self.bounds[number] : self.bounds[number + 1]].astype(np.int64)
        return {"input_ids": ids, "targets": torch.full((len(ids),), -100)}

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.bounds)


class Packs:
    """Several conversations in a row of T tokens, which do not see each other.

    Args:
        conversations: The conversations, none longer than `size`.
        size: T.
        padding: The token after the last conversation of a row.

    Items are as those of `TokenizedConversations`, with `position_ids` (T,) int64 array, which restart at each
    conversation, and at the padding. From these, networks of `transformers` detect packed sequences.
    """

    def __init__(self, conversations: TokenizedConversations, size: int, padding: int) -> None:
        self.conversations, self.size, self.padding = conversations, size, padding
        self.store = conversations.store
        self.packs = pack(conversations.lengths, size)
        self.lengths = np.full(len(self.packs), size)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, number: int) -> dict[str, Any]:
        parts = [self.conversations[part] for part in self.packs[number]]
        lengths = [len(part["input_ids"]) for part in parts]
        rest = self.size - sum(lengths)
        positions = np.concatenate([np.arange(length) for length in [*lengths, rest]])
        ids = np.concatenate([part["input_ids"] for part in parts] + [np.full(rest, self.padding)])
        targets = torch.cat([part["targets"] for part in parts] + [torch.full((rest,), -100)])
        return {"input_ids": ids, "position_ids": positions, "targets": targets}


def pack(lengths: np.ndarray, size: int) -> list[list[int]]:
    """Distributes samples to packs of at most `size` tokens: each, the longest first, to the fullest pack with room.

    Args:
        lengths: Length of each sample, (N,) integers up to `size`.
        size: Maximum length of a pack.

    Returns:
        The samples of each pack, in the order of the samples.
    """
    packs: list[list[int]] = []
    open_packs: dict[int, list[int]] = {}  # packs by the number of tokens for which they have room
    rooms = 0  # bit n is set if there is a pack with room for n tokens
    for sample in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[sample])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = open_packs[room].pop()
            if not open_packs[room]:
                rooms &= ~(1 << room)
        else:
            room, number = size, len(packs)
            packs.append([])
        packs[number].append(sample)
        open_packs.setdefault(room - length, []).append(number)
        rooms |= 1 << (room - length)
    return [sorted(samples) for samples in packs]


def collate(padding: int, items: list[dict]) -> dict[str, Any]:
    """Collates conversations or packs to a batch, padded on the right to the longest one.

    Args:
        padding: Token for padding.
        items: The samples.

    Returns:
        `input_ids` and `targets`, (B, T) int64; `position_ids`, (B, T) int64, of packs, or `attention_mask`, (B, T)
        int64, of conversations; other values as lists.
    """
    longest = max(len(item["input_ids"]) for item in items)
    if torch.cuda.is_available() and "position_ids" not in items[0]:
        longest = -(-longest // 8) * 8  # as tensor cores need it
    input_ids = torch.full((len(items), longest), padding)
    targets, mask = torch.full_like(input_ids, -100), torch.zeros_like(input_ids)
    for row, item in enumerate(items):
        length = len(item["input_ids"])
        input_ids[row, :length] = torch.from_numpy(item["input_ids"])
        targets[row, :length] = item["targets"]
        mask[row, :length] = 1
    batch: dict[str, Any] = {"input_ids": input_ids, "targets": targets}
    if "position_ids" in items[0]:
        batch["position_ids"] = torch.from_numpy(np.stack([item["position_ids"] for item in items]))
    else:
        batch["attention_mask"] = mask
    return batch | {key: [item[key] for item in items] for key in items[0] if key not in batch}
