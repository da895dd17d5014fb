"""Mistakes: writes the wrong predictions of an evaluation with the highest losses in readable form."""

import heapq
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer

from lm_lightning.data.order import PADDING
from lm_lightning.files import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "mistakes.jsonl"
KEPT = 50  # maximum number of mistakes of an evaluation
LONGEST = 1000  # maximum number of characters of a text


class Mistakes:
    """Collects wrong predictions of an evaluation and keeps those with the highest losses, each row once."""

    def __init__(self) -> None:
        self.kept: list[tuple[float, int, Any, Any]] = []  # a heap of (loss, -number of the row, right, predicted)

    def add(self, number: int, loss: float, right: Any, predicted: Any) -> None:
        """Adds a row with the values that `write` passes to `describe`; rows that only pad a batch are skipped."""
        if number == PADDING or loss != loss:
            return
        (heapq.heappush if len(self.kept) < KEPT else heapq.heappushpop)(self.kept, (loss, -number, right, predicted))

    def write(self, trainer: Trainer, title: str, describe: Callable[[int, Any, Any], dict[str, str]]) -> None:
        """Writes `mistakes.jsonl` in the run folder and forgets the rows; all processes call it.

        Its lines have `evaluation` (the title), `row` (its number in the split, from 0), `loss` (for parse trees, the
        number of wrong arcs; for answers, 1 - F1), and the dict that `describe` returns, the highest loss first.

        Args:
            trainer: The trainer of the evaluation.
            title: What was evaluated.
            describe: Converts the number of a row, the correct value and the predicted value to a dict with `text`,
                `correct` and `predicted`.
        """
        rows: list[dict[str, Any]] = [
            {"evaluation": title, "row": -number, "loss": loss} | describe(-number, right, predicted)
            for loss, number, right, predicted in self.kept
        ]
        self.kept = []
        if trainer.world_size > 1 and torch.distributed.is_initialized():
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, rows)
            rows = [row for part in parts for row in part]
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        once = {row["row"]: row for row in rows}.values()  # processes of the same replica have the same rows
        worst = sorted(once, key=lambda row: (-row["loss"], row["row"]))[:KEPT]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in worst)
        write_text(Path(trainer.default_root_dir) / FILE, lines)


def readable(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    """Decodes a row of tokens, with " | " between the texts of a pair, and cuts it to a readable length."""
    parts: list[list[int]] = [[]]
    for token in ids:
        if token == tokenizer.sep_token_id:
            parts.append([])
        else:
            parts[-1].append(token)
    text = " | ".join(
        decoded for part in parts if (decoded := tokenizer.decode(part, skip_special_tokens=True).strip())
    )
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def words_of(tokenizer: "PreTrainedTokenizerBase", example: dict[str, Any]) -> list[str]:
    """The words of an example with `words`, see `encode_words`; "…" for truncated ones."""
    places = example["words"].tolist()
    bounds = [*sorted(place for place in places if place >= 0), len(example["input_ids"])]
    ends = dict(zip(bounds, bounds[1:]))
    return [
        tokenizer.decode(example["input_ids"][place : ends[place]], skip_special_tokens=True).strip()
        if place >= 0
        else "…"
        for place in places
    ]
