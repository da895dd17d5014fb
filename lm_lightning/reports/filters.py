"""The section of a report about the filters of the corpus, from `data.json`."""

import json
import re

from lm_lightning.reports.history import Run
from lm_lightning.reports.html_parts import escape

PREFIX = "filters."  # of the names in `Run.data`, after that of a corpus of a mixture
ANY = re.compile(r"(corpora\.([^.]+)\.)?filters\.")
FIRST = re.compile(ANY.pattern + r"0\.filter")
COLUMNS = ("filter", "documents before", "removed", "marked", "changed", "details")
EXAMPLE = ("document", "split", "action", "rule", "reason", "kept", "text")


def filters(run: Run) -> str:
    """What the filters of each corpus have removed, marked and changed, with examples."""
    found = {match[1] or "": match[2] for name in run.data if (match := FIRST.fullmatch(name))}
    return "".join(
        (f"<h3>{escape(corpus)}</h3>" if corpus else "") + filters_of(run, start) for start, corpus in found.items()
    )


def filters_of(run: Run, prefix: str) -> str:
    """What the filters of a corpus have done; `prefix` is before their names in `Run.data`."""
    rows, examples, number = [], "", 0
    while (name := run.data.get(f"{prefix}{PREFIX}{number}.filter")) is not None:
        start = f"{prefix}{PREFIX}{number}."
        own = {key.removeprefix(start): text for key, text in run.data.items() if key.startswith(start)}
        cells = [name, own.get("before.documents", ""), amount(own, "removed"), amount(own, "marked")]
        rows.append([*cells, own.get("changed.documents", ""), details(own)])
        found: list[list[str]] = []
        while f"examples.{len(found)}.document" in own:
            found.append([own.get(f"examples.{len(found)}.{column}", "") for column in EXAMPLE])
        if found:
            summary = f"<summary>Examples of {escape(name)}</summary>"
            examples += f"<details>{summary}{html_table(EXAMPLE, found)}</details>"
        number += 1
    return html_table(COLUMNS, rows) + examples if rows else ""


def html_table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    """A table of texts."""
    head = "".join(f"<th scope=col>{column}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td dir=auto>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def amount(own: dict[str, str], action: str) -> str:
    """The documents and bytes that a filter has removed or marked, with their shares."""
    parts = []
    for name in ("documents", "bytes"):
        count = own.get(f"{action}.{name}", "0")
        if count != "0":
            parts.append(f"{count} {name}{percent(own.get(f'{action}.share_of_{name}', ''))}")
    return ", ".join(parts)


def percent(share: str) -> str:
    """A share in percent, in parentheses; empty if it is not a number."""
    try:
        return f" ({float(share):.2%})"
    except ValueError:
        return ""


def details(own: dict[str, str]) -> str:
    """The counts of rules and changes, and the sentences of a filter."""
    counts = {key: text for key, text in own.items() if key.startswith(("rules.", "changed."))}
    counts.pop("changed.documents", None)
    try:
        notes = json.loads(own.get("notes", "[]"))
    except ValueError:
        notes = []
    return "; ".join([*(f"{key.partition('.')[2]} {text}" for key, text in counts.items()), *map(str, notes)])


def without_filters(run: Run) -> dict[str, str]:
    """`data.json` without the filters, which have a section of their own."""
    return {name: text for name, text in run.data.items() if not ANY.match(name)}
