"""Converts rows of tables to conversations: turns with a role and a text."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

from lm_lightning.errors import UserError
from lm_lightning.finetuning.tables import Row

# Names of roles in published data sets
ROLES = {name: name for name in ("system", "developer", "user", "assistant", "tool")}
ROLES |= dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant")
ROLES |= {"human": "user", "function": "tool", "observation": "tool", "function_response": "tool"}
LISTS = ("messages", "conversations", "conversation")  # names of columns with turns
COMPLETIONS = ("completion", "response")


@dataclass
class ConversationColumns:
    """What the columns of the tables contain.

    By default, the columns of a row show it: `messages` or `conversations` with a list of turns, each with `role` and
    `content`, or `from` and `value` (ShareGPT); `instruction`, `input` and `output` (Alpaca); or `prompt` and
    `completion`. A column `system` may have a system message.

    Args:
        messages: Column with a list of turns, if it has another name.
        prompt: Template of what the user says, in Jinja, with the names of columns: `Translate: {{ source }}`.
        completion: Template of the answer, for `prompt`.
        system: Template of a system message. Rows whose turns begin with one keep their own.
    """

    messages: Optional[str] = None
    prompt: Optional[str] = None
    completion: Optional[str] = None
    system: Optional[str] = None

    def __post_init__(self) -> None:
        if (self.prompt is None) != (self.completion is None) or (self.prompt and self.messages):
            raise UserError(
                "give either --data.columns.messages, or both --data.columns.prompt and --data.columns.completion"
            )


def conversation(row: Row, columns: ConversationColumns, answered: bool = True) -> list[dict[str, Any]]:
    """The turns of a row: `role`, `content`, and other fields that a turn has.

    Args:
        row: The row.
        columns: What its columns contain.
        answered: Whether the last answer is required.

    Raises:
        UserError: If the row has no turns that can be read.
    """
    system = row.get("system") if columns.system is None else rendered(columns.system, row, "system")
    if columns.prompt is not None:
        turns = exchange(rendered(columns.prompt, row, "prompt"), completion(row, columns, answered))
    elif (name := columns.messages or next((name for name in LISTS if row.get(name) is not None), None)) is not None:
        turns = listed(row, name)
    elif "instruction" in row and ("output" in row or not answered):
        prompt = row.text("instruction")
        if extra := text(row, "input"):
            prompt += f"\n\n{extra}"
        turns = exchange(prompt, text(row, "output"))
    elif "prompt" in row and (not answered or any(name in row for name in COMPLETIONS)):
        name = next((name for name in COMPLETIONS if name in row), "")
        if isinstance(row["prompt"], str):
            turns = exchange(row["prompt"], text(row, name))
        else:
            turns = listed(row, "prompt") + (listed(row, name) if row.get(name) is not None else [])
    else:
        raise UserError(
            f"{row.where}: the columns {', '.join(map(str, row))} are no conversation (messages; conversations; "
            "instruction and output; prompt and completion): name the column with --data.columns.messages, or give "
            "--data.columns.prompt and --data.columns.completion"
        )
    if isinstance(system, str) and system.strip() and turns[0]["role"] not in ("system", "developer"):
        turns.insert(0, {"role": "system", "content": system})
    return turns


def exchange(prompt: str, answer: str) -> list[dict[str, Any]]:
    """A question and its answer."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def completion(row: Row, columns: ConversationColumns, answered: bool) -> str:
    """The answer of a row with a template; rows to predict need none."""
    try:
        return rendered(str(columns.completion), row, "completion")
    except UserError:
        if answered:
            raise
        return ""


def text(row: Row, column: str) -> str:
    """The text in a column; empty if there is none.

    Raises:
        UserError: If it is not text.
    """
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{row.where}: column {column!r} is {value!r:.40}, but must be text: fix or remove the row")
    return value or ""


def listed(row: Row, column: str) -> list[dict[str, Any]]:
    """The turns in a column."""
    values = row.entries(column, strict=True)
    if not values:
        raise UserError(
            f"{row.where}: column {column!r} is {row[column]!r:.40}, but must be a list of turns, such as "
            '[{"role": "user", "content": "Hello"}]: fix or remove the row'
        )
    return [turn(value, f"{row.where}: turn {number} of column {column!r}") for number, value in enumerate(values, 1)]


def turn(value: Any, where: str) -> dict[str, Any]:
    """A turn with `role` and `content`.

    Args:
        value: As it is in the table.
        where: Row and turn, for messages.
    """
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is {value!r:.40}, but must have role and content: fix or remove the row")
    fields = {name: item for name, item in value.items() if item is not None}
    role = fields.pop("role", None) or fields.pop("from", None)
    content = fields.pop("content", None)
    content = fields.pop("value", None) if content is None else content
    known = ROLES.get(str(role).lower())
    if known is None:
        raise UserError(f"{where} has the role {role!r:.40}, but must have one of {', '.join(ROLES)}: fix the row")
    if not isinstance(content, (str, list)) and not (content is None and fields):  # such as tool_calls
        raise UserError(f"{where} has the content {content!r:.40}, but must have text: fix or remove the row")
    return {"role": known} | ({} if content is None else {"content": content}) | fields


def is_answer(turn: Mapping[str, Any]) -> bool:
    """Whether a turn is one of the assistant that is not empty."""
    content = turn.get("content")
    return turn["role"] == "assistant" and bool(content.strip() if isinstance(content, str) else turn.keys() - {"role"})


def rendered(template: str, row: Row, option: str) -> str:
    """The text of a template with the columns of a row.

    Raises:
        UserError: If the template has an error, or names a column that the row does not have.
    """
    from jinja2 import TemplateError

    try:
        return compiled(template).render({name: "" if value is None else value for name, value in row.items()})
    except (TemplateError, TypeError, ValueError) as error:
        raise UserError(
            f"{row.where}: --data.columns.{option} {template!r:.60} cannot be filled in ({error}): the columns are "
            f"{', '.join(map(str, row))}"
        ) from error


@functools.lru_cache
def compiled(template: str) -> Any:
    """A template, which cannot run code."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(template)
