"""HTML elements of the sections of a report."""

import html
import re
from collections.abc import Sequence
from typing import Literal


def escape(text: object) -> str:
    """Text as HTML; control characters, which are not allowed in HTML, are replaced by U+FFFD."""
    return html.escape(re.sub(r"[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", str(text)))


def breakable(name: str) -> str:
    """A dotted name as HTML that may be broken between its parts on narrow pages."""
    return re.sub(r"([./_])", r"\1<wbr>", escape(name))


def section(title: str, content: str) -> str:
    """A section of the page."""
    return f"<section><h2>{escape(title)}</h2>\n{content}\n</section>"


def table(
    names: Sequence[str], columns: Sequence[dict[str, str]], different: Literal["marked", "alone", "plain"] = "plain"
) -> str:
    """A table with a column for each run or file.

    Args:
        names: Names of the columns.
        columns: For each column, the texts by the names of rows.
        different: Whether rows in which columns differ are marked (`marked`), or only these rows are shown (`alone`).
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
    """Collapsible blocks of several runs, the first one open; a single block is not collapsible."""
    if len(blocks) == 1:
        return blocks[0][1]
    return "".join(
        f"<details{' open' * (number == 0)}><summary>{escape(name)}</summary>{content}</details>"
        for number, (name, content) in enumerate(blocks)
    )
