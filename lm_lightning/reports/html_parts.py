"""Pieces of HTML that the sections of a report are made of."""

import html
import re
from collections.abc import Sequence
from typing import Literal


def escape(text: object) -> str:
    """Text as HTML; control characters, which HTML may not have, become a sign for what is unknown."""
    return html.escape(re.sub(r"[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", str(text)))


def breakable(name: str) -> str:
    """A name of parts as HTML that a narrow page may break between them."""
    return re.sub(r"([./_])", r"\1<wbr>", escape(name))


def section(title: str, content: str) -> str:
    """A part of the page."""
    return f"<section><h2>{escape(title)}</h2>\n{content}\n</section>"


def table(
    names: Sequence[str], columns: Sequence[dict[str, str]], different: Literal["marked", "alone", "plain"] = "plain"
) -> str:
    """A table of what some runs, or files, say by names.

    Args:
        names: What the columns are of.
        columns: Texts by the names of the rows.
        different: Whether rows in which the columns differ are marked, or are all that is shown.
    """
    rows = []
    for key in dict.fromkeys(key for column in columns for key in column):
        cells = [column.get(key) for column in columns]
        differs = len(set(cells)) > 1
        if differs or different != "alone":
            mark = ' class="differs"' if differs and different == "marked" else ""
            values = "".join("<td>–</td>" if cell is None else f"<td>{escape(cell)}</td>" for cell in cells)
            rows.append(f"<tr{mark}><th scope=row>{breakable(key)}</th>{values}</tr>")
    if not rows:
        return "<p>Nothing.</p>"
    heads = "".join(f'<th scope=col data-run="{number}">{breakable(name)}</th>' for number, name in enumerate(names))
    head = f"<thead><tr><td></td>{heads}</tr></thead>" if len(names) > 1 else ""
    return f'<div class="scroll"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def folded(blocks: Sequence[tuple[str, str]]) -> str:
    """Blocks of several runs, of which the first is open; that of a single one as it is."""
    if len(blocks) == 1:
        return blocks[0][1]
    return "".join(
        f"<details{' open' * (number == 0)}><summary>{escape(name)}</summary>{content}</details>"
        for number, (name, content) in enumerate(blocks)
    )
