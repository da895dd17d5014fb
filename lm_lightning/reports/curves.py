"""The curves of a report: reduces the columns of metrics.csv to few enough points to draw."""

import math
from collections.abc import Sequence
from typing import Any, Optional

from lm_lightning.callbacks.metrics_reader import Points
from lm_lightning.reports.history import Run

POINTS = 1000  # maximum number of points of a curve
MEANS = 100  # number of means of a curve in NOISY, which would not be readable otherwise
NOISY = ("train/loss", "train/gradient_norm", "train/tokens_per_second", "train/mfu")
# In the order of the page; other validation metrics come after the loss, and all others at the end.
CHARTS = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "gradient_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
    "mfu": "Model FLOPs utilization (MFU)",
    "memory": "Memory in GiB",
}
AXES = {"tokens": "train/tokens", "seconds": "train/seconds"}


def charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The curves in the form in which the template draws them, JSON-serializable.

    Returns:
        For each chart, `name`, `title` and `lines`; for each line, `run` (its number), `part` (train, mean of train,
        val, spike), `thinned` (whether it has only the extremes), and for each point `step`, `tokens`, `seconds` (None
        instead of a list if the run did not log them) and `value` (None if not finite).
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for number, run in enumerate(runs):
        curves = {name: points for name, points in run.metrics.items() if "/" in name and name not in AXES.values()}
        curves = {name: points for name, points in curves.items() if not name.startswith("corpora/")}  # in a table
        if run.spikes:
            curves["spike/loss"] = [(spike["step"], spike["loss"]) for spike in run.spikes]
        for name in NOISY:
            if len(points := curves.get(name, [])) > 3 * MEANS:
                curves[name.replace("train/", "mean/")] = means(points)
        for name, points in curves.items():
            part, _, chart = name.partition("/")
            original, points = points, [points[i] for i in thinned([value for _, value in points])]
            line: dict[str, Any] = {"run": number, "part": part, "step": [step for step, _ in points]}
            line["thinned"] = len(points) < len(original)
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
            "title": CHARTS.get(name) or title(name),
            "lines": found[name],
        }
        for name in sorted(found, key=place)
    ]


def title(name: str) -> str:
    """The title of a chart, such as "Bits per byte of novels" of `novels/bits_per_byte`."""
    corpus, _, metric = name.rpartition("/")
    words = metric.replace("_", " ").capitalize().replace("f1", "F1")
    return f"{words} of {corpus}" if corpus else words


def thinned(values: Sequence[float], limit: int = POINTS) -> list[int]:
    """The indices of the points of a curve to draw: the lowest and highest of each section; NaN counts as lowest."""
    if len(values) <= limit:
        return list(range(len(values)))
    kept, stretches = {0, len(values) - 1}, (limit - 2) // 2
    for stretch in range(stretches):
        indices = range(stretch * len(values) // stretches, (stretch + 1) * len(values) // stretches)
        for pick in (min, max):
            kept.add(pick(indices, key=lambda i: (math.isfinite(values[i]), values[i])))
    return sorted(kept)


def means(points: Points) -> Points:
    """A curve without noise: the mean of each section of steps, at the middle of the section."""
    result = []
    for stretch in range(MEANS):
        part = points[stretch * len(points) // MEANS : (stretch + 1) * len(points) // MEANS]
        result.append((part[len(part) // 2][0], sum(value for _, value in part) / len(part)))  # (the sum may overflow)
    return result


def interpolated(column: Optional[Points], steps: Sequence[int]) -> Optional[list[float]]:
    """Interpolates a column that increases from 0 at the given steps; after its end, it keeps its last value."""
    column = [(step, value) for step, value in column or [] if math.isfinite(value)]
    if not column:
        return None
    import numpy as np

    known = [(0, 0.0), *column]
    with np.errstate(all="ignore"):
        found = np.interp(steps, [step for step, _ in known], [value for _, value in known])
    return found.tolist() if np.isfinite(found).all() else None
