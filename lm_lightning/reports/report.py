"""`report`: run folders in, one HTML page out that needs nothing else: curves, samples, what differs between runs.

The tables are written here; `report.html`, the template, draws the curves from numbers that lie in the page as JSON.
"""

import html
import itertools
import json
import math
import re
import statistics
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Optional

from lm_lightning.console import printable
from lm_lightning.errors import UserError
from lm_lightning.files import write_text
from lm_lightning.reports.history import Points, Run, read
from lm_lightning.run import find_run
from lm_lightning.security.untrusted import refuse_links

POINTS = 1000  # of a curve, at most
MEANS = 100  # of a curve that needs them to be read, which are those in NOISY
NOISY = ("train/loss", "train/gradient_norm", "train/tokens_per_second", "train/mfu")
SAMPLES = 10  # of a prompt, at most
PROMPTS = 50
SPIKES = 500
NUMBERS = 100  # of samples of a spike
MISTAKES = 100
LABELS = 1000  # in the table of results
CONFUSED = 60  # labels of a confusion matrix that is shown, at most
# In the page's order; metrics of the validation that are not named here come after the loss, others at the end.
CHARTS = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "gradient_norm": "Gradient norm",
    "tokens_per_second": "Tokens a second",
    "mfu": "Model FLOPs utilization (MFU)",
    "memory": "Memory in GiB",
}
AXES = {"tokens": "train/tokens", "seconds": "train/seconds"}


# Curves


def charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The curves as the template draws them, JSON-able.

    Returns:
        Of each chart `name`, `title` and `lines`; of each line `run` (its number), `part` (train, mean of it, val,
        spike), `thinned` (whether only its extremes are there), and of each point `step`, `tokens`, `seconds` (of a run
        that does not say, None instead of a list) and `value` (None if not finite).
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for number, run in enumerate(runs):
        curves = {name: points for name, points in run.metrics.items() if "/" in name and name not in AXES.values()}
        if run.spikes:
            curves["spike/loss"] = [(spike["step"], spike["loss"]) for spike in run.spikes]
        for name in NOISY:
            if len(points := curves.get(name, [])) > 3 * MEANS:
                curves[name.replace("train/", "mean/")] = means(points)
        for name, points in curves.items():
            part, _, chart = name.partition("/")
            whole, points = points, [points[i] for i in thinned([value for _, value in points])]
            line: dict[str, Any] = {"run": number, "part": part, "step": [step for step, _ in points]}
            line["thinned"] = len(points) < len(whole)
            line |= {axis: interpolated(run.metrics.get(column), line["step"]) for axis, column in AXES.items()}
            line["value"] = [value if math.isfinite(value) else None for _, value in points]
            found.setdefault(chart, []).append(line)
    known = list(CHARTS)

    def place(name: str) -> tuple[int, int]:
        if name in known:
            return (known.index(name) and 2, known.index(name))
        return (1 if any(line["part"] == "val" for line in found[name]) else 3, 0)

    return [
        {
            "name": name,
            "title": CHARTS.get(name, name.replace("_", " ").capitalize().replace("f1", "F1")),
            "lines": found[name],
        }
        for name in sorted(found, key=place)
    ]


def thinned(values: Sequence[float], limit: int = POINTS) -> list[int]:
    """Which points of a curve are drawn: the lowest and the highest of each stretch, what is not finite as a low."""
    if len(values) <= limit:
        return list(range(len(values)))
    kept, stretches = {0, len(values) - 1}, (limit - 2) // 2
    for stretch in range(stretches):
        indices = range(stretch * len(values) // stretches, (stretch + 1) * len(values) // stretches)
        for pick in (min, max):
            kept.add(pick(indices, key=lambda i: (math.isfinite(values[i]), values[i])))
    return sorted(kept)


def means(points: Points) -> Points:
    """A curve without its noise: the mean of each of some stretches of steps, in their middle."""
    result = []
    for stretch in range(MEANS):
        part = points[stretch * len(points) // MEANS : (stretch + 1) * len(points) // MEANS]
        result.append((part[len(part) // 2][0], sum(value for _, value in part) / len(part)))  # (which may overflow)
    return result


def interpolated(column: Optional[Points], steps: Sequence[int]) -> Optional[list[float]]:
    """What a column that rises from 0 is at some steps, which it need not have; past its end, its last value."""
    column = [(step, value) for step, value in column or [] if math.isfinite(value)]
    if not column:
        return None
    import numpy as np

    known = [(0, 0.0), *column]
    with np.errstate(all="ignore"):
        found = np.interp(steps, [step for step, _ in known], [value for _, value in known])
    return found.tolist() if np.isfinite(found).all() else None


# Page


def page(runs: Sequence[Run]) -> str:
    """The report of some runs, a whole HTML document."""
    parts = [section("Summary", notes(runs) + table([run.name for run in runs], [summary(run) for run in runs]))]
    drawn = charts(runs)
    parts.append(section("Curves", '<div id="curves"></div>' if drawn else "<p>Nothing was logged.</p>"))
    labelled = (("Results by label", results), ("Confusion of labels", confusion), ("Worst mistakes", mistakes))
    for title, block in (*labelled, ("Spikes of the loss", spikes), ("Samples", samples)):
        blocks = [(run.name, written) for run in runs if (written := block(run))]
        if blocks:
            parts.append(section(title, folded(blocks)))
    parts.append(section("Config", configs(runs)))
    parts.append(section("Data", table([run.name for run in runs], [run.data for run in runs], "marked")))
    parts.append(section("Environment", table([run.name for run in runs], [run.environment for run in runs], "marked")))
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    # "<" would end the script element in "</script>"
    data = json.dumps({"runs": [run.name for run in runs], "charts": drawn}, allow_nan=False).replace("<", "\\u003c")
    content = {
        "TITLE": escape(title),
        "MADE": escape(f"made {datetime.now():%Y-%m-%d %H:%M}"),
        "BODY": "\n".join(parts),
        "DATA": data,
    }
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda match: content[match[1]], template)


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


def notes(runs: Sequence[Run]) -> str:
    """What could not be read."""
    items = "".join(f"<li>{escape(run.name)}: {escape(note)}</li>" for run in runs for note in run.notes)
    return f'<ul class="notes">{items}</ul>' if items else ""


def summary(run: Run) -> dict[str, str]:
    """What a run has come to, in words."""
    rows = {"state": "finished" if (run.folder / "model").is_dir() else "not finished (no model/)"}
    options = run.configs["config.yaml"]
    monitor = options.get("best.monitor", "val/loss")
    for name in dict.fromkeys(("val/loss", monitor)):
        scores = [(value, step) for step, value in run.metrics.get(name, []) if math.isfinite(value)]
        if scores:
            lowest = (
                lower_is_better(name)
                if options.get("best.mode") not in ("min", "max")
                else options["best.mode"] == "min"
            )
            best, step = min(scores) if lowest or name == "val/loss" else max(scores, key=lambda s: (s[0], -s[1]))
            what = (
                "lowest validation loss" if name == "val/loss" else f"best {words(name)} (decides the best checkpoint)"
            )
            rows[what] = f"{best:.4f} at step {step:,}"
    for name, points in sorted(run.metrics.items(), key=lambda item: item[0] != "val/loss"):
        if name.startswith("val/"):
            rows[f"last {words(name)}"] = f"{points[-1][1]:.4g}"
    if run.steps:
        rows["steps"] = f"{run.steps:,}"
    if "train/loss" in run.metrics:
        rows["last training loss"] = at(run, "train/loss", f"{run.metrics['train/loss'][-1][1]:.4f}")
    if "train/tokens" in run.metrics:
        rows["tokens"] = at(run, "train/tokens", f"{run.metrics['train/tokens'][-1][1]:,.0f}")
    if "train/seconds" in run.metrics:
        rows["time"] = at(run, "train/seconds", duration(run.metrics["train/seconds"][-1][1]))
    if "train/tokens_per_second" in run.metrics:
        speeds = [value for _, value in run.metrics["train/tokens_per_second"]]
        rows["tokens a second (median)"] = f"{statistics.median(speeds):,.0f}"
    if "train/memory" in run.metrics:
        rows["most memory"] = f"{max(value for _, value in run.metrics['train/memory']):.2f} GiB"
    return rows


def words(metric: str) -> str:
    """The name of a metric in words, such as "validation macro F1" of `val/macro_f1`."""
    part, _, name = metric.partition("/")
    return (
        f"{ {'val': 'validation', 'train': 'training'}.get(part, part) } {name.replace('_', ' ').replace('f1', 'F1')}"
    )


def lower_is_better(metric: str) -> bool:
    """Whether a low value of a metric is a good one, by its name."""
    return metric.endswith(("loss", "perplexity", "bits_per_byte", "mae"))


def at(run: Run, metric: str, text: str) -> str:
    """What a metric was when it was logged last, with that step if there were more."""
    step = run.metrics[metric][-1][0]
    return text if step >= run.steps else f"{text} (at step {step:,})"


def duration(seconds: float) -> str:
    """A time as people say it."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def results(run: Run) -> str:
    """How well each label is predicted, in the last evaluation."""
    if len(run.results) < 2:
        return ""
    names, *rows = run.results
    head = "".join(f"<th scope=col>{escape(name.replace('f1', 'F1').replace('_', ' '))}</th>" for name in names)
    body = "".join(
        f"<tr><th scope=row>{escape(label)}</th>{''.join(f'<td>{escape(short(cell))}</td>' for cell in cells)}</tr>"
        for label, *cells in rows[:LABELS]
    )
    left = f"<p>{len(rows) - LABELS:,} more in results.csv.</p>" if len(rows) > LABELS else ""
    return f"""<p class="faint">{escape(run.evaluated)}</p>{left}
<div class="scroll"><table class="numbers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"""


def short(cell: str) -> str:
    """A share with three digits; anything else, such as a count, as it is."""
    try:
        return f"{float(cell):.3f}" if "." in cell or "e" in cell else cell
    except ValueError:
        return cell


def confusion(run: Run) -> str:
    """How often each label was predicted as which: the darker a cell, the larger its share of the row."""
    if len(run.confusion) < 2:
        return ""
    names, rows = run.confusion[0][1:], run.confusion[1:]
    if max(len(names), len(rows)) > CONFUSED:
        return f"<p>{max(len(names), len(rows))} labels are too many to show: see confusion.csv.</p>"
    body = ""
    for label, *cells in rows:
        counts = [int(cell) if cell.isdecimal() and len(cell) < 16 else 0 for cell in cells]
        total = max(1, sum(counts))
        body += f"<tr><th scope=row>{escape(label)}</th>"
        for name, count in zip(names, counts):
            share = count / total
            title = f"{label} predicted as {name}: {count:,} of {total:,} ({share:.1%})"
            kind = " class=right" if name == label else ""
            body += (
                f'<td{kind} style="--share:{share:.3f}" title="{escape(title)}">{f"{count:,}" if count else ""}</td>'
            )
        body += "</tr>"
    head = "".join(f"<th scope=col><span>{escape(name)}</span></th>" for name in names)
    table = f'<table class="confusion"><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f"""<p class="faint">{escape(run.evaluated)}: a row for each right label, a column for each predicted one</p>
<div class="scroll">{table}</div>"""


def mistakes(run: Run) -> str:
    """The examples that the last evaluation got most wrong."""
    if not run.mistakes:
        return ""
    rows = ""
    for row in run.mistakes[:MISTAKES]:
        cells = "".join(f'<td dir="auto">{escape(row[name])}</td>' for name in ("right", "predicted", "text"))
        rows += f"<tr>{cells}<td>{row['loss']:.3g}</td><td>{row['row']:,}</td></tr>"
    head = "".join(f"<th scope=col>{name}</th>" for name in ("right", "predicted", "text", "loss", "row"))
    shown = len(run.mistakes[:MISTAKES])
    title = f"{run.mistakes[0]['evaluation']}: the {shown} with the highest loss; rows are counted from 0"
    table = f'<table class="mistakes"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<p class="faint">{escape(title)}</p><div class="scroll tall">{table}</div>'


def spikes(run: Run) -> str:
    """Steps whose loss was far above those before, and their training samples."""
    rows = ""
    for row in run.spikes[-SPIKES:]:
        more = f" and {len(row['samples']) - NUMBERS:,} more" if len(row["samples"]) > NUMBERS else ""
        numbers = escape(", ".join(map(str, row["samples"][:NUMBERS])) + more)
        rows += f"<tr><td>{row['step']:,}</td><td>{row['loss']:.4g}</td><td>{numbers}</td></tr>"
    head = "<thead><tr><th>step</th><th>loss</th><th>training samples</th></tr></thead>"
    left = f"<p>{len(run.spikes) - SPIKES:,} earlier ones in spikes.jsonl.</p>" if len(run.spikes) > SPIKES else ""
    return rows and f'{left}<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>'


def samples(run: Run) -> str:
    """What the network wrote to each prompt, from the first step to the last."""
    prompts: dict[str, dict[int, str]] = {}
    for row in run.samples:  # a step that was done again has another line
        prompts.setdefault(row["prompt"], {})[row["step"]] = row["text"]
    blocks = []
    for prompt, texts in itertools.islice(prompts.items(), PROMPTS):
        steps = sorted(texts)
        last = max(1, min(SAMPLES, len(steps)) - 1)
        shown = dict.fromkeys(steps[i * (len(steps) - 1) // last] for i in range(last + 1))
        rows = ""
        for step in shown:
            text = re.sub(r"\n{4,}", lambda blank: f"\n<i>[{len(blank[0])} line breaks]</i>\n", escape(texts[step]))
            rows += f'<dt>step {step:,}</dt><dd dir="auto"><b>{escape(prompt)}</b>{text}</dd>'
        left = f"<p>{len(steps) - len(shown)} more in samples.jsonl.</p>" if len(shown) < len(steps) else ""
        heading = f"after “{escape(prompt)}”" if prompt else "a new document"
        blocks.append(f"<h3>{heading}</h3><dl>{rows}</dl>{left}")
    if len(prompts) > PROMPTS:
        blocks.append(f"<p>{len(prompts) - PROMPTS:,} more prompts in samples.jsonl.</p>")
    return "".join(blocks)


def configs(runs: Sequence[Run]) -> str:
    """How the runs' configs differ from each other, and from those that they were resumed with; and all of them."""
    content = ""
    if len(runs) > 1:
        finals = [run.configs["config.yaml"] for run in runs]
        content += "<h3>Differences</h3>" + table([run.name for run in runs], finals, different="alone")
    for run in runs:
        if len(run.configs) > 1:
            title = f"Changed when {run.name} went on"
            changes = table(list(run.configs), list(run.configs.values()), different="alone")
            content += f"<h3>{escape(title)}</h3>" + changes.replace(" data-run=", " data-file=")
    for run in runs:
        whole = table(["value"], [run.configs["config.yaml"]])
        title = "All options" if len(runs) == 1 else f"All options of {escape(run.name)}"
        content += f"<details><summary>{title}</summary>{whole}</details>"
    return content


def write(folders: Sequence[Path], output: Path) -> None:
    """Writes the report of some run folders, so that the file is whole or not there.

    Raises:
        UserError: If one is no run folder, or the file cannot be written.
    """
    content = page([read(folder) for folder in folders])
    try:
        write_text(output, content)
    except OSError as error:
        raise UserError(f"the report {output} cannot be written ({error.strerror}): name another --output") from error


def main() -> None:
    """Reads the command line."""
    from lm_lightning.cli.explain import program
    from lm_lightning.cli.settings import Parser

    parser = Parser(
        prog=program("report"),
        description="Makes one HTML page of runs, to look at without a network: curves, samples, configs, machines.",
        exit_on_error=False,
    )
    parser.add_argument("runs", nargs="+", type=str, help="Run folders; several are laid over each other.")
    parser.add_argument(
        "--output",
        type=Optional[str],
        help="File to write. Default: report.html in the run folder, of several in the current one.",
    )
    given = parser.parse_args(sys.argv[2:])
    folders = [find_run(run) for run in given.runs]
    for folder in folders:
        refuse_links(folder)
    output = Path(given.output or (folders[0] if len(folders) == 1 else Path()) / "report.html")
    write(folders, output)
    print(printable(str(output)))
