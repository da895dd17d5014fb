"""The page of a report: converts run folders to a self-contained HTML file.

The tables are written here. The template, `report.html`, draws the curves from numbers that the page contains as JSON.
"""

import json
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from lm_lightning.errors import UserError
from lm_lightning.files import write_text
from lm_lightning.reports.curves import charts
from lm_lightning.reports.filters import filters, without_filters
from lm_lightning.reports.history import Run, read
from lm_lightning.reports.html_parts import escape, folded, section, table
from lm_lightning.reports.sections import configs, confusion, corpora, mistakes, results, samples, spikes
from lm_lightning.reports.summary import summary

TEMPLATE = Path(__file__).with_name("report.html")


def write(folders: Sequence[Path], output: Path) -> None:
    """Writes the report of run folders atomically.

    Raises:
        UserError: If a folder is not a run folder, or the file cannot be written.
    """
    content = page([read(folder) for folder in folders])
    try:
        write_text(output, content)
    except OSError as error:
        raise UserError(f"the report {output} cannot be written ({error.strerror}): give another --output") from error


def page(runs: Sequence[Run]) -> str:
    """The report of runs, a complete HTML document."""
    parts = [section("Summary", notes(runs) + table([run.name for run in runs], [summary(run) for run in runs]))]
    drawn = charts(runs)
    parts.append(section("Curves", '<div id="curves"></div>' if drawn else "<p>Nothing was logged.</p>"))
    labelled = (
        ("Corpora", corpora),
        ("Results by label", results),
        ("Confusion of labels", confusion),
        ("Worst mistakes", mistakes),
    )
    others = (("Spikes of the loss", spikes), ("Samples", samples), ("Filters of the corpus", filters))
    for title, block in (*labelled, *others):
        blocks = [(run.name, written) for run in runs if (written := block(run))]
        if blocks:
            parts.append(section(title, folded(blocks)))
    parts.append(section("Config", configs(runs)))
    parts.append(section("Data", table([run.name for run in runs], [without_filters(run) for run in runs], "marked")))
    parts.append(section("Environment", table([run.name for run in runs], [run.environment for run in runs], "marked")))
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    # "</script>" would end the script element.
    data = json.dumps({"runs": [run.name for run in runs], "charts": drawn}, allow_nan=False).replace("<", "\\u003c")
    content = {
        "TITLE": escape(title),
        "MADE": escape(f"made {datetime.now():%Y-%m-%d %H:%M}"),
        "BODY": "\n".join(parts),
        "DATA": data,
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda match: content[match[1]], template)


def notes(runs: Sequence[Run]) -> str:
    """The files that could not be read, or only partially."""
    items = "".join(f"<li>{escape(run.name)}: {escape(note)}</li>" for run in runs for note in run.notes)
    return f'<ul class="notes">{items}</ul>' if items else ""
