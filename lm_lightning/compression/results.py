"""The results of `compress`: a row for each model, saved in a file so that an interrupted command can be resumed."""

import contextlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lm_lightning.files import write_text


@dataclass
class Row:
    """The results of a model.

    Args:
        recipe: The recipe that made it.
        files: Files of its folder; see `files_of`.
        measures: Fields of `Measures`; empty if it was not measured.
        metrics: Metrics on the validation split, by their names.
        error: The reason why it failed; empty if it did not.
    """

    recipe: str
    files: list = field(default_factory=list)
    measures: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    error: str = ""


class Results:
    """The rows of a `compress`, in `compression.json`.

    Args:
        folder: Folder of the file.
        inputs: Everything on which the rows depend, JSON-serializable. Rows in the file that depend on other inputs, or
            belong to a complete `compress`, are dropped.
    """

    def __init__(self, folder: Path, inputs: dict[str, Any]) -> None:
        self.path, self.inputs = folder / "compression.json", json.loads(json.dumps(inputs))
        self.rows: dict[str, Row] = {}
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            saved = json.loads(self.path.read_text(encoding="utf-8"))
            if saved["inputs"] == self.inputs and not saved["complete"]:
                self.rows = {row["recipe"]: Row(**(row | {"error": ""})) for row in saved["rows"]}

    def made(self, recipe: str, folder: Path) -> bool:
        """Whether a model exists and has not changed since it was made."""
        row = self.rows.get(recipe)
        return row is not None and bool(row.files) and row.files == files_of(folder)

    def measured(self, recipe: str, folder: Path) -> bool:
        """Whether a model exists and has not changed since it was measured."""
        return self.made(recipe, folder) and bool(self.rows[recipe].measures)

    def errors(self) -> dict[str, str]:
        """The models that failed, with the reasons."""
        return {row.recipe: row.error for row in self.rows.values() if row.error}

    def add(self, row: Row) -> None:
        """Adds a row, which replaces an existing row of the same model."""
        self.rows[row.recipe] = row
        self.save(complete=False)

    def save(self, complete: bool) -> None:
        """Writes the file.

        Args:
            complete: Whether the next `compress` starts from the beginning.
        """
        content = {"inputs": self.inputs, "complete": complete, "rows": [asdict(row) for row in self.rows.values()]}
        write_text(self.path, json.dumps(content, indent=2))


def files_of(folder: Path) -> list:
    """Names, sizes and modification times of a folder's files; empty if the folder does not exist."""
    found = sorted(path for path in folder.glob("*") if path.is_file())
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in found]
