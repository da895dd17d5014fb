"""The sections of a report that show a run's tables, mistakes, loss spikes, samples and configs, as HTML."""

import itertools
import re
from collections.abc import Sequence

from lm_lightning.reports.history import Run
from lm_lightning.reports.html_parts import escape, table

USED = re.compile(r"corpora/[^/]+/share")  # metrics of a mixture: the share of each corpus

# Maximum numbers of items that are shown
SAMPLES = 10  # samples of a prompt
PROMPTS = 50
SPIKES = 500
NUMBERS = 100  # samples of a spike
MISTAKES = 100
LABELS = 1000  # labels in the table of results
CONFUSED = 60  # labels of a confusion matrix


def corpora(run: Run) -> str:
    """What a mixture consisted of so far, and how well each corpus was predicted in the last validation."""
    names = list(dict.fromkeys(name.split("/")[1] for name in run.metrics if USED.fullmatch(name)))
    if not names:
        return ""
    columns = {
        "training tokens": lambda name: amount(run.data.get(f"corpora.{name}.splits.train.tokens", "")),
        "tokens used": lambda name: last(run, f"corpora/{name}/tokens", "{:,.0f}"),
        "share": lambda name: last(run, f"corpora/{name}/share", "{:.2%}"),
        "epochs": lambda name: last(run, f"corpora/{name}/epochs", "{:.2f}"),
        "validation loss": lambda name: last(run, f"val/{name}/loss", "{:.4f}"),
        "bits per byte": lambda name: last(run, f"val/{name}/bits_per_byte", "{:.4f}"),
    }
    head = "".join(f"<th scope=col>{column}</th>" for column in ("corpus", *columns))
    body = "".join(
        f"<tr><th scope=row>{escape(name)}</th>{''.join(f'<td>{escape(text(name))}</td>' for text in columns.values())}"
        "</tr>"
        for name in names
    )
    rows = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="numbers">{rows}</table></div>'


def last(run: Run, metric: str, shown: str) -> str:
    """The last value of a metric, in a format; a dash if it was not logged."""
    return shown.format(run.metrics[metric][-1][1]) if run.metrics.get(metric) else "–"


def amount(text: str) -> str:
    """A whole number with separators; a dash if the text is none."""
    return f"{int(text):,}" if text.isdecimal() and len(text) < 16 else "–"


def results(run: Run) -> str:
    """The scores of each label in the last evaluation."""
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
    """Shortens a fraction to three digits; other cells, such as counts, are not changed."""
    try:
        return f"{float(cell):.3f}" if "." in cell or "e" in cell else cell
    except ValueError:
        return cell


def confusion(run: Run) -> str:
    """The confusion matrix: the darker a cell, the larger its share of the row."""
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
    return f"""<p class="faint">{escape(run.evaluated)}: true labels are the rows, predicted labels the columns</p>
<div class="scroll">{table}</div>"""


def mistakes(run: Run) -> str:
    """The wrong predictions with the highest losses in the last evaluation."""
    if not run.mistakes:
        return ""
    rows = ""
    for row in run.mistakes[:MISTAKES]:
        cells = "".join(f'<td dir="auto">{escape(row[name])}</td>' for name in ("correct", "predicted", "text"))
        rows += f"<tr>{cells}<td>{row['loss']:.3g}</td><td>{row['row']:,}</td></tr>"
    head = "".join(f"<th scope=col>{name}</th>" for name in ("correct", "predicted", "text", "loss", "row"))
    shown = len(run.mistakes[:MISTAKES])
    title = f"{run.mistakes[0]['evaluation']}: the {shown} with the highest loss; rows are counted from 0"
    table = f'<table class="mistakes"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<p class="faint">{escape(title)}</p><div class="scroll tall">{table}</div>'


def spikes(run: Run) -> str:
    """Steps whose loss was far above the losses before, and their training samples."""
    rows = ""
    for row in run.spikes[-SPIKES:]:
        more = f" and {len(row['samples']) - NUMBERS:,} more" if len(row["samples"]) > NUMBERS else ""
        numbers = escape(", ".join(map(str, row["samples"][:NUMBERS])) + more)
        rows += f"<tr><td>{row['step']:,}</td><td>{row['loss']:.4g}</td><td>{numbers}</td></tr>"
    head = "<thead><tr><th>step</th><th>loss</th><th>training samples</th></tr></thead>"
    left = f"<p>{len(run.spikes) - SPIKES:,} earlier ones in spikes.jsonl.</p>" if len(run.spikes) > SPIKES else ""
    return rows and f'{left}<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>'


def samples(run: Run) -> str:
    """The generated text for each prompt, from the first step to the last."""
    prompts: dict[str, dict[int, str]] = {}
    references: dict[str, str] = {}  # correct texts, where there are any
    for row in run.samples:  # a repeated step has another line
        prompts.setdefault(row["prompt"], {})[row["step"]] = row["text"]
        if "reference" in row:
            references[row["prompt"]] = row["reference"]
    blocks = []
    for prompt, texts in itertools.islice(prompts.items(), PROMPTS):
        steps = sorted(texts)
        last = max(1, min(SAMPLES, len(steps)) - 1)
        shown = dict.fromkeys(steps[i * (len(steps) - 1) // last] for i in range(last + 1))
        rows, begin = "", "" if prompt in references else f"<b>{escape(prompt)}</b>"
        for step in shown:
            text = re.sub(r"\n{4,}", lambda blank: f"\n<i>[{len(blank[0])} line breaks]</i>\n", escape(texts[step]))
            rows += f'<dt>step {step:,}</dt><dd dir="auto">{begin}{text}</dd>'
        if prompt in references:
            rows += f'<dt>correct</dt><dd dir="auto">{escape(references[prompt])}</dd>'
        left = f"<p>{len(steps) - len(shown)} more in samples.jsonl.</p>" if len(shown) < len(steps) else ""
        preposition = "for" if prompt in references else "after"
        heading = f"{preposition} “{escape(prompt)}”" if prompt else "a new document"
        blocks.append(f"<h3>{heading}</h3><dl>{rows}</dl>{left}")
    if len(prompts) > PROMPTS:
        blocks.append(f"<p>{len(prompts) - PROMPTS:,} more prompts in samples.jsonl.</p>")
    return "".join(blocks)


def configs(runs: Sequence[Run]) -> str:
    """The differences between the configs of runs, and between those of the parts of a resumed run; and all options."""
    content = ""
    if len(runs) > 1:
        finals = [run.configs["config.yaml"] for run in runs]
        content += "<h3>Differences</h3>" + table([run.name for run in runs], finals, different="alone")
    for run in runs:
        if len(run.configs) > 1:
            title = f"Changed when {run.name} was resumed"
            changes = table(list(run.configs), list(run.configs.values()), different="alone")
            content += f"<h3>{escape(title)}</h3>" + changes.replace(" data-run=", " data-file=")
    for run in runs:
        options = table(["value"], [run.configs["config.yaml"]])
        title = "All options" if len(runs) == 1 else f"All options of {escape(run.name)}"
        content += f"<details><summary>{title}</summary>{options}</details>"
    return content
