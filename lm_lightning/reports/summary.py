"""The summary of a run: its state, best and last metrics, steps, time and memory, as texts by name."""

import math
import statistics

from lm_lightning.reports.history import Run


def summary(run: Run) -> dict[str, str]:
    """The rows of the table, as text."""
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
        if name.startswith("val/") and name.count("/") == 1:  # those of single corpora have their own table
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
        rows["tokens per second (median)"] = f"{statistics.median(speeds):,.0f}"
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
    """Whether lower values of a metric are better, by its name."""
    return metric.endswith(("loss", "perplexity", "bits_per_byte", "mae"))


def at(run: Run, metric: str, text: str) -> str:
    """The last value of a metric, as `text`, with its step if the run has later steps."""
    step = run.metrics[metric][-1][0]
    return text if step >= run.steps else f"{text} (at step {step:,})"


def duration(seconds: float) -> str:
    """A duration in readable form."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
