"""The curves of a report: the columns of metrics.csv in, few enough points to draw out."""

import math
from collections.abc import Sequence
from typing import Any, Optional

from lm_lightning.callbacks.metrics_reader import Points
from lm_lightning.reports.history import Run

POINTS = 1000  # of a curve, at most
MEANS = 100  # of a curve that needs them to be readable, which are those in NOISY
NOISY = ("train/loss", "train/gradient_norm", "train/tokens_per_second", "train/mfu")
# In the page's order; metrics of the validation that are not named here come after the loss, others at the end.
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
