"""Cells of tables as labels, lists and numbers, in the forms in which spreadsheets, pandas and JSON write them."""

import ast
import json
import math
import re
from typing import Any, Optional

LONGEST = 1_000_000  # characters of a cell that is parsed
LIST = re.compile(r"\s*\[.*\]\s*", re.DOTALL)
QUOTED = re.compile(r"""\s*\[\s*['"].*['"]\s*\]\s*""", re.DOTALL)  # a list of strings, whatever is wrong with it
ADJACENT = re.compile(r"""(['"])\s+['"]""")  # as numpy writes arrays, which Python joins to one string
INTEGER = re.compile(r"([+-]?\d+)\.0+")
NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
GREATEST = 3.4e38  # of float32


def parsed(cell: str) -> Any:
    """The value that a cell spells, as JSON or as Python writes lists and dicts.

    Raises:
        ValueError: If it is neither of the two, or too long.
    """
    if len(cell) > LONGEST:
        raise ValueError(f"it has more than {LONGEST:,} characters")
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        pass
    if ADJACENT.search(cell):
        raise ValueError("there is no comma between two strings")
    try:
        return ast.literal_eval(cell.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        raise ValueError("it is neither JSON nor a list of Python") from None


def as_list(value: Any, strict: bool = False) -> Optional[list]:
    """The list that a value is or, as a string, spells; None if it is neither.

    Args:
        value: A cell.
        strict: Whether a string in brackets that cannot be read is an error also if it has no quotes inside.

    Raises:
        ValueError: If a string looks like a list of strings, but cannot be read.
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
    """The name of a label as it stands in a cell, without space around it; empty if there is none."""
    if value is None or isinstance(value, float) and math.isnan(value):
        return ""
    return str(value).strip()


def has_outer_space(value: Any) -> bool:
    """Whether a label has space around it."""
    return isinstance(value, str) and value != value.strip()


def canonical(name: str) -> str:
    """One spelling of labels that mean the same: 1 and 1.0, True and true."""
    if name.lower() in ("true", "false"):
        return name.capitalize()
    number = INTEGER.fullmatch(name)
    return number[1] if number else name


def merged(names: set[str]) -> dict[str, str]:
    """The one name of each label that is spelled in several ways, by its spellings."""
    spellings: dict[str, set[str]] = {}
    for name in names:
        spellings.setdefault(canonical(name), set()).add(name)
    return {name: one for one, several in spellings.items() if len(several) > 1 for name in several}


def number(value: Any) -> float:
    """A number.

    Raises:
        ValueError: If a value is none, not finite, or too large for float32; says why, if that is not plain to see.
    """
    if isinstance(value, str):
        if re.fullmatch(r"\s*[+-]?\d+,\d+\s*", value):
            raise ValueError("write a point instead of the comma")
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
