"""Filters a corpus, once: the result is cached. `filter.py` has the base classes of filters.

Filters are applied in the order of `--data.corpus.filters`, each to the
documents that the ones before it have left. In the cache are:

    <cache>/filtered/<fingerprint>/info.json        counts and examples for each filter
                                   filtered.jsonl   each removed or marked document: filter, reason, kept duplicate
                                   texts, *.npy     the documents that remain, see `documents.py`
"""

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Optional

from lm_lightning.console import printable
from lm_lightning.data.documents import Documents
from lm_lightning.data.filter import CorpusFilter, Filter
from lm_lightning.data.verdicts import SPLITS, Changed, Document, Removed, Verdict
from lm_lightning.errors import UserError

EXAMPLES = 5  # examples of each filter in the report
EXCERPT = 200  # characters of an example
WIDTH = 20  # columns of the names of filters on the console


@dataclass
class Tally:
    """What a filter has done: the entry of a filter in `info.json`.

    Attributes:
        filter: Name of its class.
        before: Number of documents and UTF-8 bytes that it was applied to.
        removed: Number and share of the documents, bytes and documents of each split that it removed.
        marked: The same of those that it marked.
        changed: Number of documents that it changed, and of changes of each kind.
        rules: Number of removed or marked documents for each rule.
        notes: Sentences of the filter.
        examples: Some of the documents: name, split, rule, reason, beginning of the text, and the kept document.
    """

    filter: str
    before: dict[str, int]
    removed: dict[str, Any] = field(default_factory=dict)
    marked: dict[str, Any] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    rules: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, action: str, rule: str, split: str, size: int) -> None:
        """Counts a document that is `removed` or `marked`."""
        counts = getattr(self, action)
        for name, amount in (("documents", 1), ("bytes", size), (split, 1)):
            counts[name] = counts.get(name, 0) + amount
        self.rules[rule] = self.rules.get(rule, 0) + 1

    def finish(self) -> dict[str, Any]:
        """The entry, JSON-serializable, with shares and without what is empty."""
        for counts in (self.removed, self.marked):
            for name in ("documents", "bytes") if counts else ():
                counts[f"share_of_{name}"] = round(counts[name] / max(1, self.before[name]), 6)
        self.rules = dict(sorted(self.rules.items(), key=lambda rule: (-rule[1], rule[0])))
        entry = {name: value for name, value in vars(self).items() if value}
        return {"removed": {"documents": 0}} | entry if not (self.removed or self.changed or self.marked) else entry


class Chain:
    """Applies several filters that judge single documents, one after the other; sent to the processes."""

    def __init__(self, filters: Sequence[Filter]) -> None:
        self.filters = filters

    def __call__(self, document: Document) -> list[tuple[int, Verdict]]:
        """The verdicts that are not None, each with the position of its filter; after a removal there are none."""
        verdicts: list[tuple[int, Verdict]] = []
        for position, own in enumerate(self.filters):
            if document.split not in own.splits or (verdict := own.judge(document)) is None:
                continue
            if isinstance(verdict, Changed):
                if not verdict.text.strip():
                    verdict = Removed("empty", "no text is left after the changes")
                else:
                    document = document._replace(text=verdict.text)
            verdicts.append((position, verdict))
            if isinstance(verdict, Removed):
                break
        return verdicts


def run(filters: Sequence[Filter], documents: Documents, listing: IO[str]) -> list[dict[str, Any]]:
    """Applies filters to documents in order, and writes a line to `listing` for each removed or marked document.

    Returns:
        For each filter, what it has done: see `Tally`.
    """
    report: list[dict[str, Any]] = []
    start = 0
    while start < len(filters):
        end = start + 1
        if not isinstance(filters[start], CorpusFilter):  # neighbors that judge single documents share a pass
            while end < len(filters) and not isinstance(filters[end], CorpusFilter):
                end += 1
        group = filters[start:end]
        names = ", ".join(type(own).__name__ for own in group)
        documents.task = f"filter {start + 1}{f' to {end}' if end > start + 1 else ''} of {len(filters)}: {names}"
        report += _judge(group, documents, listing)
        start = end
    return report


def _judge(group: Sequence[Filter], documents: Documents, listing: IO[str]) -> list[dict[str, Any]]:
    """Applies one `CorpusFilter`, or several other filters in one pass."""
    before = documents.count()
    tallies = [Tally(type(own).__name__, dict(before)) for own in group]
    findings: Iterable[tuple[int, list[tuple[int, Verdict]], Optional[int]]]
    if isinstance(group[0], CorpusFilter):
        findings = _found(group[0], documents, tallies[0])
    else:
        findings = ((number, verdicts, None) for number, verdicts in documents.map(Chain(group)))
    gone: list[Counter[str]] = [Counter() for _ in group]
    removed = []
    for number, verdicts, kept in findings:
        split, size, text = SPLITS[documents.splits[number]], documents.size(number), None
        for position, verdict in verdicts:
            tally = tallies[position]
            example: dict[str, Any] = {"document": documents.name(number), "split": split}
            if isinstance(verdict, Changed):
                tally.changed["documents"] = tally.changed.get("documents", 0) + 1
                for kind, count in verdict.counts.items():
                    tally.changed[kind] = tally.changed.get(kind, 0) + count
                example["text"] = verdict.example or verdict.text[:EXCERPT]
                text = verdict.text
            elif verdict is not None:
                action = "removed" if isinstance(verdict, Removed) else "marked"
                tally.add(action, verdict.rule, split, size)
                if action == "removed":
                    removed.append(number)
                    gone[position] += {"documents": 1, "bytes": size}
                line = {"filter": tally.filter, "action": action, **example, "rule": verdict.rule}
                line |= {"reason": verdict.reason} if verdict.reason else {}
                line |= {} if kept is None else {"kept": documents.name(kept)}
                listing.write(json.dumps(line, ensure_ascii=False) + "\n")
                if len(tally.examples) < EXAMPLES:  # the text is read only for these
                    example = {**line, "text": documents.text(number)[:EXCERPT]}
                    del example["filter"]
            if len(tally.examples) < EXAMPLES:
                tally.examples.append(example)
        if text is not None and number not in removed[-1:]:
            documents.replace(number, text)
    documents.remaining[removed] = False
    for position, tally in enumerate(tallies):  # a filter in a shared pass is applied to what the ones before it left
        for earlier in gone[:position]:
            tally.before = {name: count - earlier[name] for name, count in tally.before.items()}
    return [tally.finish() for tally in tallies]


def _found(
    own: CorpusFilter, documents: Documents, tally: Tally
) -> Iterator[tuple[int, list[tuple[int, Verdict]], Optional[int]]]:
    """The findings of a filter; its sentences are added to the report."""
    for found in own.find(documents):
        if isinstance(found, str):
            tally.notes.append(found)
        else:
            yield found.number, [(0, found.verdict)], found.kept


def filter_corpus(
    filters: Sequence[Filter], pieces: Iterable[Any], total: Optional[int], processes: Optional[int], folder: Path
) -> None:
    """Filters a corpus and writes the result into a folder.

    Args:
        filters: The filters, in order.
        pieces: The documents: the pieces that `corpus.read` yields.
        total: Approximate number of UTF-8 bytes of the pieces, for the progress bar; None if unknown.
        processes: Number of processes; None for the number of CPU cores. It does not affect the result.
        folder: An empty folder.

    Raises:
        UserError: If no training document remains.
    """
    with contextlib.closing(Documents(folder, pieces, total, processes)) as documents:
        before = documents.count()
        with open(folder / "filtered.jsonl", "w", encoding="utf-8") as listing:
            report = run(filters, documents, listing)
        print("\n".join(lines(report)))
        if not (documents.remaining & (documents.splits == SPLITS.index("train"))).any():
            raise UserError(
                f"no training document is left of {before['documents']:,} documents after the filters "
                f"{', '.join(own['filter'] for own in report)}: remove some of the `filters` of the corpus, or relax "
                "their thresholds"
            )
        documents.save()
    info = {"before": before, "after": documents.count(), "filters": report}
    (folder / "info.json").write_text(json.dumps(info, indent=2), encoding="utf-8")


def lines(report: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The lines of the console about filters, with the number of documents and their shares."""
    for entry in report:
        parts = []
        for action in ("removed", "marked"):
            if counts := entry.get(action):
                if not counts["documents"]:
                    parts.append(f"{action} nothing")
                    continue
                parts.append(
                    f"{action} {counts['documents']:,} of {entry['before']['documents']:,} documents "
                    f"({counts['share_of_documents']:.2%}), {counts['bytes']:,} bytes ({counts['share_of_bytes']:.2%})"
                )
        if rules := entry.get("rules"):
            parts.append(", ".join(f"{rule} {count:,}" for rule, count in rules.items()))
        if changed := entry.get("changed"):
            counted = ", ".join(f"{kind} {count:,}" for kind, count in changed.items() if kind != "documents")
            parts.append(f"changed {changed['documents']:,} documents: {counted}")
        parts += entry.get("notes", [])
        yield printable(f"{entry['filter']:{WIDTH}} {'; '.join(parts)}")
