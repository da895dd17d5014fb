"""Converts cells of tables to labels, lists and numbers, as spreadsheets, pandas and JSON write them."""

import ast
import json
import math
import re
from typing import Any, Optional

LONGEST = 1_000_000  # maximum number of characters of a cell that is parsed
LIST = re.compile(r"\s*\[.*\]\s*", re.DOTALL)
QUOTED = re.compile(r"""\s*\[\s*['"].*['"]\s*\]\s*""", re.DOTALL)  # a list of strings, even if it is malformed
ADJACENT = re.compile(r"""(['"])\s+['"]""")  # numpy's format of arrays, which Python would read as a single string
INTEGER = re.compile(r"([+-]?\d+)\.0+")
NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
GREATEST = 3.4e38  # the largest float32


def parsed(cell: str) -> Any:
    """Parses a cell that has a JSON value, or a list or dict in Python syntax.

    Raises:
        ValueError: If it is neither, or too long.
    """
    if len(cell) > LONGEST:
        raise ValueError(f"it has more than {LONGEST:,} characters")
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        pass
    if ADJACENT.search(cell):
        raise ValueError("a comma is missing between two strings")
    try:
        return ast.literal_eval(cell.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        raise ValueError("it is neither JSON nor a Python list") from None


def as_list(value: Any, strict: bool = False) -> Optional[list]:
    """Converts a list, or a string that represents one, to a list; None if the value is neither.

    Args:
        value: A cell.
        strict: Whether a string in brackets that cannot be parsed is an error even if it contains no quotes.

    Raises:
        ValueError: If a string looks like a list of strings, but cannot be parsed.
    """
    if isinstance(value, (list, tuple)):
        return list(value)
    if not isinstance(value, str) or not LIST.fullmatch(value):
        return None
    try:
        found = parsed(value)
    except ValueError:
        if strict or QUOTED.fullmatch(value):
            raise
        return None
    return found if isinstance(found, list) else None


def label(value: Any) -> str:
    """The name of the label in a cell, without surrounding white space; empty if there is none."""
    if value is None or isinstance(value, float) and math.isnan(value):
        return ""
    return str(value).strip()


def has_outer_space(value: Any) -> bool:
    """Whether a label has surrounding white space."""
    return isinstance(value, str) and value != value.strip()


def canonical(name: str) -> str:
    """The canonical spelling of a label, so that 1 and 1.0, or True and true, are the same label."""
    if name.lower() in ("true", "false"):
        return name.capitalize()
    number = INTEGER.fullmatch(name)
    return number[1] if number else name


def merged(names: set[str]) -> dict[str, str]:
    """Maps the different spellings of a label to one of them; labels with a single spelling are omitted."""
    spellings: dict[str, set[str]] = {}
    for name in names:
        spellings.setdefault(canonical(name), set()).add(name)
    return {name: one for one, several in spellings.items() if len(several) > 1 for name in several}


def number(value: Any) -> float:
    """Converts a cell to a number.

    Raises:
        ValueError: If it is not a number, not finite, or too large for float32; has a message if the reason is not
            obvious.
    """
    if isinstance(value, str):
        if re.fullmatch(r"\s*[+-]?\d+,\d+\s*", value):
            raise ValueError("use a decimal point instead of the comma")
        if not NUMBER.fullmatch(value):
            raise ValueError("")
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not abs(result) <= GREATEST:
        raise ValueError("it must be finite")
    return result
