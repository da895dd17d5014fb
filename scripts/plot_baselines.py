"""Draws bits per byte of the validation split over time, for runs with the same tokenizer and split.

python scripts/plot_baselines.py docs/images/baselines.svg builtin=RUN,RUN,... gutenberg=RUN,RUN,...

Each argument is a corpus with its run folders, each in a folder with the name of its model.
"""

import csv
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np


def curve(run: Path) -> tuple[list[float], list[float]]:
    """Seconds of training and bits per byte of each validation of a run."""
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    times = [(float(row["step"]), float(row["train/seconds"])) for row in rows if row.get("train/seconds")]
    found = [(float(r["step"]), float(r["val/bits_per_byte"])) for r in rows if r.get("val/bits_per_byte")]
    steps, seconds = zip(*times)
    return [float(np.interp(step, steps, seconds)) for step, _ in found], [value for _, value in found]


def main() -> None:
    """Reads the command line."""
    target, *corpora = sys.argv[1:]
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 9}
    figure, axes = plt.subplots(1, len(corpora), figsize=(4 * len(corpora), 3), squeeze=False)
    for axis, corpus in zip(axes[0], corpora):
        name, _, runs = corpus.partition("=")
        for run in map(Path, runs.split(",")):
            axis.plot(*curve(run), marker=".", label=run.resolve().parent.name)
        axis.set(title=name, xlabel="seconds of training")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("bits per byte (validation)")
    axes[0][-1].legend()
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None} if target.endswith(".svg") else None)


if __name__ == "__main__":
    main()
