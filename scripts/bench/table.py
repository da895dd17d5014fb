"""Writes the figures of measurements into docs/speed.md: `python scripts/bench/table.py RESULTS.txt ...`.

Each file has the output of `python scripts/bench`, whose lines of JSON are read. Measurements on a machine that
was busy with other work are marked as preliminary.
"""

import json
import statistics
import sys
from pathlib import Path

PAGE = Path(__file__).parent.parent.parent / "docs" / "speed.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
BUSY = 0.5  # load for each core, of other work, above which figures are preliminary


def rows(found: dict) -> list[str]:
    """The rows of the table for a measurement."""
    settings, machine = found["settings"], found["machine"]
    names = ("task", "layers", "hidden", "length", "batch", "seconds", "megabytes", "prompt", "new")
    what = ", ".join(f"{name} {settings[name]}" for name in names if settings.get(name) is not None)
    what += f", threads {machine['threads']}"
    note = " (preliminary)" if (machine["load"] or 0) > machine["cores"] * (1 + BUSY) else ""
    lines = []
    for name, runs in found["results"].items():
        if name == found["reference"]:
            continue
        for metric in dict.fromkeys(metric for run in runs for metric in run):
            median = statistics.median(run[metric] for run in runs if metric in run)
            ratio = found["ratios"].get(name, {}).get(metric)
            if found["reference"] and ratio is None:  # nothing to compare with
                continue
            shown = (
                f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) to {found['reference']}"
                if ratio
                else ""
            )
            value = f"{median:,.0f}" if median >= 1000 else f"{median:.4g}"
            lines.append(f"| {found['kind']}{note}: {what} | {name}: {metric} | {value} | {shown} |")
    return lines


def main(paths: list[str]) -> None:
    """Replaces the table of the page."""
    lines = [line for path in paths for line in Path(path).read_text(encoding="utf-8").splitlines()]
    measured = [json.loads(line) for line in lines if line.startswith('{"kind"')]
    machine = measured[-1]["machine"]
    parts = [machine["cpu"], f"{machine['cores']} cores", machine["gpu"]]
    parts += [f"PyTorch {machine['torch']}", f"transformers {machine['transformers']}"]
    where = ", ".join(filter(None, parts))
    head = f"Measured on {where}.\nValues and ratios are medians, with the smallest and largest ratio.\n"
    table = [
        "| measurement | figure | value | ratio |",
        "|---|---|---|---|",
        *(row for found in measured for row in rows(found)),
    ]
    page = PAGE.read_text(encoding="utf-8")
    before, after = page[: page.index(BEGIN) + len(BEGIN)], page[page.index(END) :]
    PAGE.write_text("\n".join([before, head, *table, after]), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
