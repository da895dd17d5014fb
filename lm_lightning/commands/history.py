"""History: a run folder in; its curves, options, samples and spikes out, as far as they can be read."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_lightning.errors import UserError

Points = list[tuple[int, float]]  # (step, value), by rising steps


@dataclass
class Run:
    """What a run folder says.

    Attributes:
        folder: Its path.
        metrics: Of each column of metrics.csv, the steps that have a value.
        configs: File name to options by dotted names; config.yaml is the last.
        environment: environment.json, by dotted names.
        data: data.json, by dotted names.
        samples: Lines of samples.jsonl.
        spikes: Lines of spikes.jsonl.
        results: results.csv, the results of each label in the last evaluation, the names of the columns first.
        confusion: confusion.csv, how often each label was predicted as which, the names of the columns first.
        evaluated: What these are of, such as "validation, step 60".
        mistakes: Lines of mistakes.jsonl.
        steps: Optimizer steps that were done.
        notes: What could not be read.
    """

    folder: Path
    metrics: dict[str, Points] = field(default_factory=dict)
    configs: dict[str, dict[str, str]] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    spikes: list[dict[str, Any]] = field(default_factory=list)
    results: list[list[str]] = field(default_factory=list)
    confusion: list[list[str]] = field(default_factory=list)
    evaluated: str = ""
    mistakes: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return "/".join(self.folder.parts[-2:])


def read(folder: Path) -> Run:
    """Reads a run folder; files that are not there, or cut since the run was killed, are read as far as they go.

    Raises:
        UserError: If it is no run folder.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"{folder} is no run folder: it has no config.yaml; name a folder such as runs/gpt/2026-11-25_10-30-00"
        )
    run = Run(folder.resolve())
    run.metrics = read_metrics(folder / "metrics.csv", run.notes)
    numbered = sorted(folder.glob("config.*.yaml"), key=lambda file: (len(file.name), file.name))
    run.configs = {file.name: read_options(file, run.notes) for file in [*numbered, folder / "config.yaml"]}
    run.environment = read_options(folder / "environment.json", run.notes)
    data = read_options(folder / "data.json", run.notes)
    run.data = {name: text for name, text in data.items() if text != "null"}  # options that were not given
    run.samples = read_lines(folder / "samples.jsonl", {"step": int, "prompt": str, "text": str}, run.notes)
    run.spikes = read_lines(folder / "spikes.jsonl", {"step": int, "loss": float, "samples": list}, run.notes)
    run.results = read_table(folder / "results.csv", run.notes)
    run.confusion = read_table(folder / "confusion.csv", run.notes)
    run.evaluated = text_of(folder / "results.md", run.notes).partition("\n")[0]
    fields = {"evaluation": str, "row": int, "loss": float, "text": str, "right": str, "predicted": str}
    run.mistakes = read_lines(folder / "mistakes.jsonl", fields, run.notes)
    run.steps = read_steps(run)
    return run


def read_steps(run: Run) -> int:
    """The steps of a run: not all are logged, so its last checkpoint counts, too."""
    steps = max((points[-1][0] for points in run.metrics.values()), default=0)
    checkpoint = run.folder / "checkpoints" / "last.ckpt"
    if not checkpoint.exists():
        return steps
    from lm_lightning.run import load_checkpoint

    try:
        return max(steps, load_checkpoint(checkpoint, weights=False, checked=True)["global_step"])
    except UserError:
        run.notes.append("checkpoints/last.ckpt is cut or damaged")
        return steps


def read_table(file: Path, notes: list[str]) -> list[list[str]]:
    """The rows of a CSV file, as many cells each as the first; nothing if it is not there."""
    rows = list(csv.reader(text_of(file, notes).replace("\0", "").splitlines()))
    whole = [row for row in rows if len(row) == len(rows[0])]
    if len(whole) < len(rows):
        notes.append(f"{file.name}: cut or damaged rows are left out ({len(rows) - len(whole)})")
    return whole


def read_metrics(file: Path, notes: list[str]) -> dict[str, Points]:
    """The columns of metrics.csv; a row that is cut, such as the last of a killed run, is left out."""
    metrics: dict[str, dict[int, float]] = {}
    *lines, rest = text_of(file, notes).replace("\0", "").split("\n")
    bad = int(bool(rest))  # (its last number may be cut, too)
    for row in csv.DictReader(lines):
        try:
            step = step_of(row.pop("step", ""))
            values = {name: float(value) for name, value in row.items() if name and value}
        except (TypeError, ValueError):
            bad += 1
            continue
        for name, value in values.items():
            metrics.setdefault(name, {})[step] = value
    if bad:
        notes.append(f"{file.name}: cut or damaged rows are left out ({bad})")
    return {name: sorted(points.items()) for name, points in metrics.items()}


def step_of(value: Any) -> int:
    """A number of steps.

    Raises:
        ValueError: If a run cannot have so many; also TypeError and OverflowError.
    """
    step = int(value)
    if not 0 <= step < 1 << 53:
        raise ValueError(f"{step} is no step")
    return step


def read_options(file: Path, notes: list[str]) -> dict[str, str]:
    """A YAML or JSON file as texts by dotted names."""
    import yaml

    try:
        content = yaml.load(text_of(file, notes), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError):
        notes.append(f"{file.name} is cut or damaged")
        return {}
    return dict(flat(content))


def flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Texts of what options hold, by dotted names; lists of options are numbered."""
    if isinstance(value, dict) and (value or not name):
        for key, item in value.items():
            yield from flat(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for number, item in enumerate(value):
            yield from flat(item, f"{name}.{number}")
    elif name:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def read_lines(file: Path, fields: dict[str, type], notes: list[str]) -> list[dict[str, Any]]:
    """The lines of a JSONL file that have these fields."""
    rows, bad = [], 0
    for line in text_of(file, notes).split("\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append(
                {name: step_of(row[name]) if name == "step" else kind(row[name]) for name, kind in fields.items()}
            )
        except (ValueError, TypeError, KeyError, OverflowError):
            bad += 1
    if bad:
        notes.append(f"{file.name}: cut or damaged lines are left out ({bad})")
    return rows


def text_of(file: Path, notes: list[str]) -> str:
    """A file's text; nothing if it is not there."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        notes.append(f"{file.name} cannot be read ({error.strerror})")
        return ""
