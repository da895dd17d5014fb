"""Rows of preference data: a prompt with a better and a worse answer, as texts or as messages.

The formats are those of TRL's data sets: the prompt may have a column of its own, or be the common beginning of both
answers.
"""

import os.path
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

from lm_lightning.errors import UserError
from lm_lightning.finetuning import cells
from lm_lightning.finetuning.tables import Row

Message = dict[str, Any]  # `role`, `content` and whatever else the chat template reads
ROLES = {"human": "user", "gpt": "assistant"}  # names of ShareGPT


@dataclass
class PreferenceColumns:
    """Names of the columns. Each contains a text, or messages: a list of dicts with `role` and `content`.

    Args:
        prompt: The prompt. If there is none, it is the beginning that both answers have in common.
        chosen: The better answer; messages may include those of the prompt.
        rejected: The worse answer, like the better one.
    """

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"


class Pair(NamedTuple):
    """A prompt with two answers.

    Attributes:
        prompt: A text, or messages.
        chosen: The better answer: a text or messages, like the prompt.
        rejected: The worse answer.
    """

    prompt: Any
    chosen: Any
    rejected: Any


def pair_of(row: Row, columns: PreferenceColumns) -> Pair:
    """The pair in a row.

    Raises:
        UserError: If a column has neither a text nor messages, or there is no answer after the prompt.
    """
    if columns.prompt != PreferenceColumns.prompt:
        row.value(columns.prompt)  # a name that was given must exist
    prompt = None if row.get(columns.prompt) is None else content(row, columns.prompt)
    chosen, rejected = content(row, columns.chosen), content(row, columns.rejected)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            return split_texts(row, chosen, rejected, columns)
        if isinstance(prompt, str):
            return Pair(prompt, chosen, rejected)
    chosen, rejected = (as_messages(answer, "assistant") for answer in (chosen, rejected))
    before = [] if prompt is None else as_messages(prompt, "user")
    if chosen[0]["role"] != "assistant" and isinstance(prompt, str):
        before = []  # as in UltraFeedback, whose column `prompt` repeats the first message
    if before and all(answer[: len(before)] == before for answer in (chosen, rejected)):
        before = []
    return split_messages(row, before, chosen, rejected, columns)


def content(row: Row, column: str) -> str | list[Message]:
    """The text or the messages in a column; messages may be JSON, as in cells of CSV files.

    Raises:
        UserError: If it is neither, or a message has no role or content.
    """
    value = row.value(column)
    if isinstance(value, str):
        found = messages(value)
        return value if found is None else found
    found = messages([value] if isinstance(value, dict) else value)
    if not found:
        raise UserError(
            f"{row.where}: column {column!r} is {value!r:.60}, but must be a text, or a list of messages with role and "
            "content: fix or remove the row"
        )
    return found


def messages(value: Any) -> Optional[list[Message]]:
    """The messages in a cell; None if it has none."""
    try:
        found = cells.as_list(value)
    except ValueError:
        return None
    if not found or not all(isinstance(item, dict) for item in found):
        return None
    if all(isinstance(item.get("from"), str) and "value" in item for item in found):
        found = [{"role": ROLES.get(item["from"], item["from"]), "content": item["value"]} for item in found]
    return found if all(isinstance(item.get(key), str) for item in found for key in ("role", "content")) else None


def as_messages(value: str | list[Message], role: str) -> list[Message]:
    """Messages as they are; a text as a message of a role."""
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def split_texts(row: Row, chosen: str, rejected: str, columns: PreferenceColumns) -> Pair:
    """Separates two texts from their common beginning, at white space, which then belongs to the answers.

    Raises:
        UserError: If they have none.
    """
    common = os.path.commonprefix([chosen, rejected])
    if common in (chosen, rejected) or not all(text[len(common) :][:1].isspace() for text in (chosen, rejected)):
        while common and not common[-1].isspace():
            common = common[:-1]
        common = common.rstrip()
    if not common:
        raise UserError(
            f"{row.where}: there is no prompt: {columns.chosen!r} and {columns.rejected!r} do not begin with the same "
            f"words, and there is no column {columns.prompt!r}: give the column of the prompt with "
            "--data.columns.prompt, or fix the row"
        )
    return Pair(common, chosen[len(common) :], rejected[len(common) :])


def split_messages(
    row: Row,
    before: list[Message],
    chosen: Sequence[Message],
    rejected: Sequence[Message],
    columns: PreferenceColumns,
) -> Pair:
    """Separates two conversations from their common beginning, so that each answer begins with the assistant's turn.

    Raises:
        UserError: If this is not possible.
    """
    start = 0
    for number, (one, other) in enumerate(zip(chosen, rejected)):
        if one["role"] == other["role"] == "assistant":
            start = number
        if one != other:
            break
    prompt = [*before, *chosen[:start]]
    if not prompt or chosen[start]["role"] != "assistant" or rejected[start]["role"] != "assistant":
        raise UserError(
            f"{row.where}: after their common beginning, {columns.chosen!r} and {columns.rejected!r} must continue "
            "with a message of the assistant, after one of the user: fix or remove the row"
        )
    return Pair(prompt, list(chosen[start:]), list(rejected[start:]))
