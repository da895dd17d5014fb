"""Writes the table and the plot of `compress`."""

import csv
import io
import math
from pathlib import Path

from lm_lightning.callbacks.predictions import without_formula
from lm_lightning.compression.measures import Measures, pareto
from lm_lightning.compression.results import Row
from lm_lightning.files import write_picture, write_text

HEAD = [
    "recipe",
    "parameters",
    "zeros",
    "MiB of the blocks' layers",
    "on disk",
    "in memory",
    "ms, 1 row",
    "8 rows",
    "tokens/s, 1 row",
    "8 rows",
    "loss",
]
LEGEND = "In parentheses: the ratio to the first row. Bold: no other model is smaller, faster and better."
MARKERS = "oDs^vP"  # markers of the points in the plot, each for ten colors


def write(rows: list[Row], folder: Path) -> None:
    """Writes `compression.csv` and `compression.md`.

    Args:
        rows: Rows, the one of the uncompressed model first; rows that have not been measured yet are omitted.
        folder: Existing folder.
    """
    measured = {row.recipe: Measures(**row.measures) for row in rows if row.measures}
    baseline, best = measured[rows[0].recipe], pareto(list(measured.values()))
    rows = [row for row in rows if row.measures or row.error]
    metrics = sorted({name for row in rows for name in row.metrics} - {"val/loss"})
    write_text(folder / "compression.csv", csv_text(rows, measured, metrics, best))
    with_errors = any(row.error for row in rows)
    head = [*HEAD, *metrics]
    lines = [head + ["error"] * with_errors, ["---"] + ["--:"] * (len(head) - 1) + ["---"] * with_errors]
    for row in rows:
        if row.error:
            lines.append([row.recipe, *[""] * (len(head) - 1), row.error.replace("|", "\\|")])
        else:
            cells = markdown_cells(row, measured[row.recipe], baseline, metrics, row.recipe in best)
            lines.append(cells + [""] * with_errors)
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    write_text(folder / "compression.md", f"{text}\n\n{LEGEND}\n")


def csv_text(rows: list[Row], measured: dict[str, Measures], metrics: list[str], best: set[str]) -> str:
    """The CSV file: the fields of `Measures`, the metrics, whether the model is Pareto-optimal, and the error."""
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow([*Measures._fields, *metrics, "pareto", "error"])
    for row in rows:
        values = measured.get(row.recipe, [row.recipe] + [""] * (len(Measures._fields) - 1))
        error = without_formula(row.error)  # it may quote the content of a file
        table.writerow([*values, *(row.metrics.get(name, "") for name in metrics), row.recipe in best, error])
    return text.getvalue()


def markdown_cells(row: Row, own: Measures, baseline: Measures, metrics: list[str], bold: bool) -> list[str]:
    """The cells of a measured model in the Markdown table; NaN becomes an empty cell."""
    cells = [
        f"{own.parameters:,}" if own.parameters else "",
        f"{own.zeros:.1%}",
        *(f"{value:.1f} ({value / other:.2f})" for value, other in zip(own[3:6], baseline[3:6])),
        *(f"{value:.1f} ({ratio:.2f})" for value, ratio in zip(own[6:10], own[10:14])),
        f"{own.loss:.4f}",
        *(f"{row.metrics[name]:.4f}" if name in row.metrics else "" for name in metrics),
    ]
    return [f"**{row.recipe}**" if bold else row.recipe, *("" if "nan" in cell else cell for cell in cells)]


def plot(rows: list[Row], folder: Path) -> None:
    """Draws `compression.png`, if matplotlib is installed; see `write`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    models = [Measures(**row.measures) for row in rows if row.measures]
    best = pareto(models)
    fields = {"disk": "MiB on disk"}
    if not math.isnan(models[0].loss):
        fields = {"loss": "loss"} | fields
    # The names are in a legend, since they would overlap at the points.
    figure = Figure(figsize=(5.5 + 3 * len(fields), max(4.0, 1.0 + 0.25 * len(models))), layout="constrained")
    panels = figure.subplots(1, len(fields), squeeze=False)[0]
    for axes, (name, label) in zip(panels, fields.items()):
        for number, model in enumerate(models):
            axes.scatter(
                model.relative_latency_1,
                getattr(model, name),
                color=f"C{number % 10}",
                marker=MARKERS[number // 10 % len(MARKERS)],
                s=60,
                edgecolors="black" if model.recipe in best else "none",
                label=model.recipe,
            )
        axes.set(xlabel="time of a pass, 1 row\n(ratio to the uncompressed model)", ylabel=label)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside right upper",
        fontsize=8,
        title="black edge: Pareto-optimal",
    )
    write_picture(folder / "compression.png", figure)
