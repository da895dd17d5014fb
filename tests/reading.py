"""Somebody who types the commands of the README and of a page of docs/ into a shell, in order, as they stand.

What differs: placeholders such as RUN stand for what the commands before have left, and recipes in the reader's copy
of `configs/` are smaller (`shrink`). A test of a page has the mark `under`, and lives in the folder of the feature that
the page is about.
"""

import csv
import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, command
from test_configs import PRETRAINING, SMALL

NOT_RUN = {  # what a command begins with, and why it is not run here
    "pip install": "the packages are installed",
    "pytest": "that is what runs this",
    "torchrun": "needs a second machine (test_fit.py has torchrun on one)",
    "sbatch": "needs SLURM (test_survival.py simulates it)",
    "pre-commit": "runs the same commands as CI",
    "ruff": "CI runs it",
    "mypy": "CI runs it",
    "lint-imports": "CI runs it",
    "wandb": "needs an account",  # fork: tracking
    "git": "test_fork.py merges a change of the template",  # fork: template
    "cd": "test_fork.py merges a change of the template",  # fork: template
    "python scripts/bench": "test_bench.py runs it with tiny networks",
    "python scripts/fork.py": "test_fork.py runs it",  # fork: template
}
BASE = re.compile(r"FOLDER(_HUB_NAME_OR_RUN|_OR_HUB_NAME)?$")
RUN = re.compile(r"(runs/\w+/)?(RUN(_OR_MODEL)?|\d{4}-\d\d-\d\d_[\d-]+)$")
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))]


def is_run(words: list[str]) -> bool:
    """Whether a command can be run here."""
    return not any(words[: len(start.split())] == start.split() for start in NOT_RUN)


def commands(page: str) -> dict[str, list[list[str]]]:
    """The words of all commands in the code blocks of a page, by the heading that they are under.

    A block without a language has commands alone.
    """
    found: dict[str, list[list[str]]] = {}
    heading, block = "", None
    for line in (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            block = line[3:] if block is None else None
        elif block is None and line.startswith("#"):
            heading = line.lstrip("# ")
        elif block == "" and line:
            found.setdefault(heading, []).extend(shlex.split(part) for part in line.split("&&"))
    return found


def under(page: str, heading: str) -> Callable:
    """Gives a test, as the parameter `typed`, the commands of a page under a heading."""
    found = commands(page).get(heading, [])
    return pytest.mark.parametrize("typed", [[words for words in found if is_run(words)]], ids=[heading])


def shrink(configs: Path, cache_dir: Path, corpus: Path) -> None:
    """Makes the recipes of pretraining those of tiny networks that train six steps on a user's text."""
    for file in configs.glob("*.yaml"):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        model, data, trainer = (
            content["model"]["init_args"],
            content["data"].setdefault("init_args", {}),
            content["trainer"],
        )
        trainer |= {"accelerator": "cpu", "precision": "32-true", "log_every_n_steps": 1}
        if content["data"]["class_path"] in PRETRAINING and (network := model.get("network")):
            model["network"] = network | SMALL[network["model_type"]]
            if content["model"]["class_path"] != "NGramLM":  # which is not trained by gradients
                model |= {"schedule": {"warmup_steps": 1}, "compile": False}
            algorithm = "wordpiece" if content["data"]["class_path"] == "MaskedData" else "bpe"
            data |= {"tokenizer": {"algorithm": algorithm, "vocab_size": 400, "lowercase": algorithm == "wordpiece"}}
            data |= {"block_size": 64, "batch_size": 4, "num_workers": 0, "cache_dir": str(cache_dir)}
            own = {"paths": [str(corpus)], "validation_fraction": 0.1}
            if "corpora" in data:
                data["corpora"] = {name: options | own for name, options in data["corpora"].items()}
            else:
                data["corpus"] = own
            trainer |= {"max_steps": 6, "val_check_interval": 3, "limit_val_batches": 2, "accumulate_grad_batches": 1}
        file.write_text(yaml.safe_dump(content), encoding="utf-8")


class Reader:
    """Somebody who types commands into a shell, one after the other."""

    def __init__(self, run: Callable[..., str], base: Path) -> None:
        self.run, self.base = run, base
        self.fitted: list[Path] = []  # run folders of `fit`
        self.known: dict[str, str] = {}  # other placeholders
        self.more: list[str] = []  # in the place of `...`

    def type_all(self, typed: list[list[str]]) -> list[str]:
        """Runs commands in order."""
        assert typed, "there are no commands under this heading"
        return [self.type(words) for words in typed]

    def type(self, words: list[str]) -> str:
        """Runs a command, returns what it prints, and checks what it has left."""
        assert words[:3] == ["python", "-m", "lm_lightning"]
        arguments: list[str] = []
        for word in words[3:]:
            if word == "...":
                arguments += self.more
            elif BASE.match(word):
                arguments.append(str(self.base))
            elif RUN.match(word):
                arguments.append(str(self.fitted[-1]))
            else:
                arguments.append(self.known.get(word, word))
        out = self.run(*arguments)
        if arguments[0] == "fit" and "--print_config" not in arguments:
            folder = Path(re.search(r"^run folder: (.*)$", out, re.M)[1])  # type: ignore[index]
            self.fitted.append(folder)
            assert self.logged("val/loss") and all(map(math.isfinite, self.logged("val/loss")))
            assert (folder / "model" / "model.safetensors").is_file()
        return out

    def logged(self, metric: str) -> list[float]:
        """What the last run has logged."""
        with open(self.fitted[-1] / "metrics.csv", newline="", encoding="utf-8") as file:
            return [float(row[metric]) for row in csv.DictReader(file) if row.get(metric)]

    def validate(self) -> None:
        """Checks that an evaluation of the last run finds what the run found itself."""
        out = self.run("validate", self.fitted[-1])
        shown = {m[1]: float(m[2]) for m in re.finditer(r"│ +(val/\S+) +│ +([\d.e+-]+) +│", out)}
        assert any(shown["val/loss"] == pytest.approx(loss, rel=1e-4) for loss in self.logged("val/loss")), shown

    def predictions(self) -> list[dict]:
        """The rows of the newest file of them."""
        file = max(Path("runs").rglob("predictions.jsonl"), key=lambda file: file.stat().st_mtime_ns)
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def in_a_process(*arguments: object) -> str:
    """What a command prints; it must not fail."""
    result = command(*arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout
