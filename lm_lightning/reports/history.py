"""Reads the content of a run folder for a report, as far as it is readable."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_lightning.callbacks.metrics_reader import NAME, Points, csv_rows, read_metrics, step_of
from lm_lightning.errors import UserError
from lm_lightning.security.bounded import WHOLE_BYTES, text_of
from lm_lightning.security.redaction import redact, redact_arguments

# A run may be untrusted or damaged, so there are limits on what is read and shown.
YAML_BYTES = 1 << 20  # size of a config
LINES = 20_000  # lines of a JSONL file
CELL = 1000  # characters of a cell of another table
TEXT = 10_000  # characters of any other text
OPTIONS = 5000  # options of a file
CONFIGS = 20  # configs of earlier parts of a resumed run


@dataclass
class Run:
    """The content of a run folder.

    Attributes:
        folder: Path of the folder.
        metrics: For each column of metrics.csv, the values with their steps.
        configs: Options by dotted names, for each file name; config.yaml comes last.
        environment: environment.json, by dotted names.
        data: data.json, by dotted names.
        samples: Lines of samples.jsonl.
        spikes: Lines of spikes.jsonl.
        results: results.csv, the scores of each label in the last evaluation; the first row has the names of columns.
        confusion: confusion.csv, the confusion matrix of the last evaluation; the first row has the names of columns.
        evaluated: The evaluation of the previous two, such as "validation, step 60".
        mistakes: Lines of mistakes.jsonl.
        steps: Number of optimizer steps.
        notes: Sentences about everything that could not be read.
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
    """Reads a run folder. Files may be missing, or incomplete because the run was killed.

    Raises:
        UserError: If it is not a run folder.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"{folder} is not a run folder, as it has no config.yaml: give one such as runs/gpt/2026-11-25_10-30-00"
        )
    run = Run(folder.resolve())
    run.metrics = read_metrics(folder / "metrics.csv", run.notes)
    numbered = sorted(folder.glob("config.*.yaml"), key=lambda file: (len(file.name), file.name))
    if len(numbered) > CONFIGS:
        run.notes.append(f"{len(numbered) - CONFIGS} of {len(numbered)} earlier configs are omitted")
        numbered = numbered[-CONFIGS:]
    run.configs = {file.name: read_options(file, run.notes) for file in [*numbered, folder / "config.yaml"]}
    run.environment = read_options(folder / "environment.json", run.notes)
    data = read_options(folder / "data.json", run.notes)
    run.data = {name: text for name, text in data.items() if text != "null"}  # without options that were not given
    sample: dict[str, Callable[[Any], Any]] = {"step": int, "prompt": str, "text": str}
    run.samples = read_lines(folder / "samples.jsonl", sample, run.notes, ["reference"])
    run.spikes = read_lines(folder / "spikes.jsonl", {"step": int, "loss": float, "samples": whole_numbers}, run.notes)
    run.results = read_table(folder / "results.csv", run.notes)
    run.confusion = read_table(folder / "confusion.csv", run.notes)
    run.evaluated = cut(text_of(folder / "results.md", run.notes).partition("\n")[0], CELL)
    fields: dict[str, Callable[[Any], Any]] = {
        "evaluation": str,
        "row": int,
        "loss": float,
        "text": str,
        "correct": str,
        "predicted": str,
    }
    run.mistakes = read_lines(folder / "mistakes.jsonl", fields, run.notes)
    run.steps = read_steps(run)
    return run


def read_steps(run: Run) -> int:
    """The number of steps of a run; since not all steps are logged, its last checkpoint is also read."""
    steps = max((points[-1][0] for points in run.metrics.values()), default=0)
    checkpoint = run.folder / "checkpoints" / "last.ckpt"
    if not checkpoint.exists():
        return steps
    from lm_lightning.checkpoints.loading import load_checkpoint

    try:
        return max(steps, step_of(load_checkpoint(checkpoint, weights=False, verified=True)["global_step"]))
    except (UserError, ValueError, TypeError, KeyError, OverflowError):
        run.notes.append("checkpoints/last.ckpt is incomplete or damaged")
        return steps


def read_table(file: Path, notes: list[str]) -> list[list[str]]:
    """The rows of a CSV file, each with as many cells as the first; empty if there is no such file."""
    rows = list(csv_rows(text_of(file, notes).splitlines()))
    complete = [[cut(cell, CELL) for cell in row] for row in rows if row is not None and len(row) == len(rows[0] or [])]
    if len(complete) < len(rows):
        notes.append(f"{file.name}: incomplete or damaged rows are omitted ({len(rows) - len(complete)})")
    return complete


def whole_numbers(value: Any) -> list[int]:
    """Converts a value to a list of integers.

    Raises:
        ValueError: If it is not a list of integers; also TypeError and OverflowError.
    """
    return [int(item) for item in value]


def read_options(file: Path, notes: list[str]) -> dict[str, str]:
    """A YAML or JSON file as texts by dotted names, without secrets."""
    import yaml

    from lm_lightning import yaml_text

    is_json = file.suffix == ".json"
    text = text_of(file, notes, WHOLE_BYTES if is_json else YAML_BYTES)
    if not text.strip():
        return {}
    try:
        content = json.loads(text) if is_json else yaml_text.load(text)
        if isinstance(content, dict) and isinstance(command := content.get("command"), list):
            content["command"] = redact_arguments([str(argument) for argument in command])
        options = list(itertools.islice(flat(redact(content)), OPTIONS + 1))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = yaml_text.explain_error(error) if isinstance(error, yaml.MarkedYAMLError) else ""
        notes.append(f"{file.name} is incomplete or damaged{reason}")
        return {}
    if len(options) > OPTIONS:
        notes.append(f"{file.name}: only its first {OPTIONS:,} options are shown")
    return {cut(name, NAME): cut(value, TEXT) for name, value in options[:OPTIONS]}


def cut(text: str, longest: int) -> str:
    """A text, shortened to its beginning and the number of omitted characters if it is too long."""
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text) - longest:,} more characters)"


def flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """The values of options as text, with dotted names; items of lists are numbered."""
    if isinstance(value, dict) and (value or not name):
        for key, item in value.items():
            yield from flat(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for number, item in enumerate(value):
            yield from flat(item, f"{name}.{number}")
    elif name:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def read_lines(
    file: Path, fields: dict[str, Callable[[Any], Any]], notes: list[str], optional: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The lines of a JSONL file that have these fields; texts that only some lines have are `optional`."""
    rows, bad = [], 0
    lines = [line for line in text_of(file, notes, last=True).split("\n") if line.strip()]
    if len(lines) > LINES:
        notes.append(f"{file.name}: only the last {LINES:,} of {len(lines):,} lines are shown")
    for line in lines[-LINES:]:
        try:
            row = json.loads(line)
            values = {name: step_of(row[name]) if name == "step" else kind(row[name]) for name, kind in fields.items()}
            values |= {name: str(row[name]) for name in optional if name in row}
            rows.append({name: cut(value, TEXT) if isinstance(value, str) else value for name, value in values.items()})
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            bad += 1
    if bad:
        notes.append(f"{file.name}: incomplete or damaged lines are omitted ({bad})")
    return rows
