"""`compress`: a finished model in; smaller ones, and a table and picture of what each costs and gains, out.

Everything in the table is measured on this machine: time by the network alone, loss and metrics by a `validate` of the
run's own config with the compressed weights.
"""

import contextlib
import csv
import functools
import hashlib
import io
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

from lm_lightning import hub
from lm_lightning.console import printable
from lm_lightning.errors import UserError
from lm_lightning.files import write_picture, write_text
from lm_lightning.run import model_folder
from lm_lightning.security import imports
from lm_lightning.security.untrusted import refuse_links


def compress(
    model: str,
    recipe: list[str] | str = (),  # type: ignore[assignment]
    output: Optional[str] = None,
    config: Optional[str] = None,
    beside: list[str] = [],  # noqa: B006
    modules: list[str] | str = (),  # type: ignore[assignment]
    calibration_batches: int = 16,
    tokens: int = 64,
    seconds: float = 1.0,
    device: Literal["cpu", "cuda"] = "cpu",
    measure: bool = True,
) -> None:
    """Compresses a finished model without training, and measures the result.

    A recipe that fails is a row of the table with its reason; the others are finished, and the exit status is 2. After
    that or an interruption, the same command does only what is missing; after success it starts again.

    Args:
        model: Run folder or `from_pretrained` folder.
        recipe: One, or more as `[int8, nf4]`: int8, int8-weights, float8-weights (torchao; on GPUs also float8 and
            int4-weights), bnb-int8, nf4, fp4 (bitsandbytes), sparse=0.5, 2:4, wanda=0.5, wanda-2:4 (zeros), width=0.5,
            heads=0.5, layers=0.5 (smaller networks), onnx, onnx-int8, onnx-int8-blocks, onnx-int4, pt2 (other
            formats); several steps with + between, such as width=0.5+int8; none to measure alone. Default: each one,
            as far as it fits the network.
        output: Folder of the compressed models, the table and the picture, which may not have any of them yet.
            Default: `compressed` in the run folder, or one beside the model's; older ones there are replaced.
        config: Config of a run, with whose data the loss is measured. Default: that of the run folder.
        beside: More models to measure, such as one that was trained further after a compression.
        modules: Patterns of the names of linear layers of the blocks, such as `*mlp*`, for the steps that make weights
            zero or quantize them. Default: all of them.
        calibration_batches: How many training batches of the config tell what units, blocks and inputs weigh; 0 to go
            by the weights alone. The recipes with wanda need some.
        tokens: Of each row of the timed passes.
        seconds: How long each time is measured.
        device: What the times are measured on.
        measure: Whether to measure, and not only to make the compressed models.
    """
    from lm_lightning.cli.command import split_list
    from lm_lightning.compression import calibration, measures, recipes

    hub.quiet()
    source = model_folder(model)
    recipe, modules = split_list(recipe), split_list(modules)
    chosen = [one for one in recipe or recipes.STEPS if one != "none"]
    for one in chosen:
        recipes.steps_of(one)
    others = {name: model_folder(name) for name in beside}
    own = Path(model) / "config.yaml"
    settings = Path(config) if config else own if own.is_file() else None
    if settings and not settings.is_file():
        raise UserError(f"there is no config {settings}: give that of a run, or one of configs/")
    if settings and not config:
        imports.restrict(settings)
    folder = Path(output) if output else default_folder(Path(model), source)
    refuse_links(Path(model) if folder.parent == Path(model) else folder)
    targets = {one: folder / one.replace(":", "of").replace("=", "-") for one in chosen}
    made_of = {
        "model": files(source),
        "config": hashlib.sha256(settings.read_bytes()).hexdigest() if settings else None,
        "options": [modules, calibration_batches, tokens, seconds, device],
    }
    table = Table(folder, made_of)
    there = [target for one, target in targets.items() if target.exists() and not table.made(one, target)]
    if output and there:
        raise UserError(f"{there[0]} exists already: remove it, or name another --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be made ({error.strerror}): name another --output") from error
    inputs = None
    if settings and calibration_batches:  # once for all recipes that begin with the same model
        inputs = functools.cache(functools.partial(calibration.calibrate, settings, batches=calibration_batches))

    skipped = []

    def failed(one: str, error: Exception) -> None:
        imports.check()
        reason = " ".join(str(error).split())[:500]
        if isinstance(error, UserError) and not recipe and one in targets:
            print(printable(f"{one}: left out, since {reason}"), flush=True)
            skipped.append(one)
            return
        reason = reason if isinstance(error, UserError) else f"{type(error).__name__}: {reason}"
        print(printable(f"{one}: failed: {reason}"), flush=True)
        table.add(Row(one, files({**targets, **others}[one]), error=reason))

    for one, target in targets.items():
        if table.made(one, target):
            print(f"{one}: {target} is there already", flush=True)
            continue
        try:
            recipes.compress(source, one, target, inputs, modules)
        except Exception as error:
            failed(one, error)
        else:
            table.add(Row(one, files(target)))
            print(f"{one}: {target}", flush=True)
    if measure and (not targets or len(table.errors()) < len(targets)):
        bench = measures.Bench(source, tokens, seconds, device)
        models = {"none": source, **targets, **others}
        for one, target in models.items():
            if one in skipped or one in table.errors() or table.measured(one, target):
                continue
            try:
                found = evaluate(settings, source, target, device) if settings else {}
                row = bench.measure(one, target, found.get("val/loss", math.nan))
            except Exception as error:
                if one == "none":  # with which the others are compared
                    raise
                failed(one, error)
                continue
            table.add(Row(one, files(target), row._asdict(), found))
            write([table.rows[name] for name in models if name in table.rows], folder)
            print(f"{one}: measured", flush=True)
        rows = [table.rows[name] for name in models if name in table.rows]
        write(rows, folder)
        draw(rows, folder)
        print(printable((folder / "compression.md").read_text(encoding="utf-8")))
        print(f"table: {folder / 'compression.md'}")
    if errors := table.errors():
        raise UserError(
            f"{len(errors)} of {len(targets) + len(others)} failed, which the same command tries again: "
            + "; ".join(f"{one}: {reason}" for one, reason in errors.items())
        )
    table.complete()


@dataclass
class Row:
    """What is known of a model.

    Args:
        recipe: How it was made.
        files: Of its folder; see `files`.
        measures: Of `Measures`; empty if it was not measured.
        metrics: Of the validation split.
        error: Why it failed; empty if it has not.
    """

    recipe: str
    files: list = field(default_factory=list)
    measures: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    error: str = ""


class Table:
    """The rows of a `compress`, kept in `compression.json`, so that an interrupted one can be repeated.

    Args:
        folder: Where the file is, or will be.
        made_of: What the rows depend on. Those of a file that depend on something else, or that is complete, are
            dropped.
    """

    def __init__(self, folder: Path, made_of: dict[str, Any]) -> None:
        self.path, self.made_of = folder / "compression.json", json.loads(json.dumps(made_of))
        self.rows: dict[str, Row] = {}
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            saved = json.loads(self.path.read_text(encoding="utf-8"))
            if saved["made_of"] == self.made_of and not saved["complete"]:
                self.rows = {row["recipe"]: Row(**(row | {"error": ""})) for row in saved["rows"]}

    def made(self, recipe: str, folder: Path) -> bool:
        """Whether a model is there as it was made."""
        row = self.rows.get(recipe)
        return row is not None and bool(row.files) and row.files == files(folder)

    def measured(self, recipe: str, folder: Path) -> bool:
        """Whether a model is there as it was measured."""
        return self.made(recipe, folder) and bool(self.rows[recipe].measures)

    def errors(self) -> dict[str, str]:
        """The models that failed, and why."""
        return {row.recipe: row.error for row in self.rows.values() if row.error}

    def add(self, row: Row) -> None:
        """Keeps a row, in the place of an earlier one of the same model."""
        self.rows[row.recipe] = row
        self.save(complete=False)

    def complete(self) -> None:
        """Has the next `compress` begin anew."""
        self.save(complete=True)

    def save(self, complete: bool) -> None:
        """Writes the file."""
        content = {"made_of": self.made_of, "complete": complete, "rows": [asdict(row) for row in self.rows.values()]}
        write_text(self.path, json.dumps(content, indent=2))


def files(folder: Path) -> list:
    """Names, sizes and times of a folder's files, which change with them; empty if it is not there."""
    found = sorted(path for path in folder.glob("*") if path.is_file())
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in found]


def default_folder(model: Path, source: Path) -> Path:
    """`compressed` in a run folder, else beside the model's."""
    return source.with_name(f"{source.name}-compressed") if model == source else model / "compressed"


def evaluate(settings: Path, source: Path, folder: Path, device: str) -> dict[str, float]:
    """The metrics of a run's validation split, with the weights or the program of a folder made of `source`."""
    from lightning.pytorch import Callback, LightningModule, Trainer
    from transformers.utils import ModelOutput

    from lm_lightning.compression import calibration, formats

    program = formats.runner(folder)

    class InTheNetworksPlace(Callback):
        """Has the program give the outputs."""

        def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pl_module.has_linear_head = False

            def forward(**inputs: Any) -> ModelOutput:
                inputs.pop("use_cache", None)
                return ModelOutput(program(**inputs))  # type: ignore[misc]

            pl_module.network.forward = forward

    if program is None:
        trainer = calibration.run(settings, folder, [], device=device)
    else:
        trainer = calibration.run(settings, source, [InTheNetworksPlace()])
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def write(rows: list[Row], folder: Path) -> None:
    """Writes `compression.csv` and `.md`.

    Args:
        rows: The first is of the uncompressed model.
        folder: Is there.
    """
    from lm_lightning.compression.measures import Measures, pareto
    from lm_lightning.data.cells import without_formula

    measured = {row.recipe: Measures(**row.measures) for row in rows if row.measures}
    best, whole = pareto(list(measured.values())), measured[rows[0].recipe]
    rows = [row for row in rows if row.measures or row.error]  # not those to be measured yet
    names = sorted({name for row in rows for name in row.metrics} - {"val/loss"})
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow([*Measures._fields, *names, "pareto", "error"])
    for row in rows:
        values = measured.get(row.recipe, [row.recipe] + [""] * (len(Measures._fields) - 1))
        error = without_formula(row.error)  # which may repeat what a file says
        table.writerow([*values, *(row.metrics.get(name, "") for name in names), row.recipe in best, error])
    write_text(folder / "compression.csv", text.getvalue())
    head = [
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
        *names,
    ]
    errors = ["error"] if any(row.error for row in rows) else []
    lines = ["| " + " | ".join([*head, *errors]) + " |", "|---" + "|--:" * (len(head) - 1) + "|---" * len(errors) + "|"]
    for row in rows:
        if row.error:
            cells = [row.recipe, *[""] * (len(head) - 1), row.error.replace("|", "\\|")]
            lines.append("| " + " | ".join(cells) + " |")
            continue
        own = measured[row.recipe]
        cells = [
            f"**{row.recipe}**" if row.recipe in best else row.recipe,
            f"{own.parameters:,}" if own.parameters else "",
            f"{own.zeros:.1%}",
            *(f"{value:.1f} ({value / other:.2f})" for value, other in zip(own[3:6], whole[3:6])),
            *(f"{value:.1f} ({share:.2f})" for value, share in zip(own[6:10], own[10:14])),
            f"{own.loss:.4f}",
            *(f"{row.metrics[name]:.4f}" if name in row.metrics else "" for name in names),
            *[""] * len(errors),
        ]
        lines.append("| " + " | ".join("" if "nan" in cell else cell for cell in cells) + " |")
    lines += [
        "",
        "In brackets: as a part of the first row's, in turn with it. Bold: no other is smaller, faster and better.",
    ]
    write_text(folder / "compression.md", "\n".join(lines) + "\n")


MARKERS = "oDs^vP"  # of the picture's points, when ten colors are used up


def draw(table: list[Row], folder: Path) -> None:
    """Draws `compression.png` where matplotlib is installed; see `write`."""
    from lm_lightning.compression.measures import Measures, pareto

    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows = [Measures(**row.measures) for row in table if row.measures]
    best = pareto(rows)
    has_loss = not math.isnan(rows[0].loss)
    fields = {"loss": "loss", "disk": "MiB on disk"} if has_loss else {"disk": "MiB on disk"}
    # The names are beside the panels: at their points they would lie over each other.
    figure = Figure(figsize=(5.5 + 3 * len(fields), max(4.0, 1.0 + 0.25 * len(rows))), layout="constrained")
    panels = figure.subplots(1, len(fields), squeeze=False)[0]
    for axes, (name, label) in zip(panels, fields.items()):
        for number, row in enumerate(rows):
            axes.scatter(
                row.relative_latency_1,
                getattr(row, name),
                color=f"C{number % 10}",
                marker=MARKERS[number // 10 % len(MARKERS)],
                s=60,
                edgecolors="black" if row.recipe in best else "none",
                label=row.recipe,
            )
        axes.set(xlabel="time of a pass, 1 row\n(share of the uncompressed model's)", ylabel=label)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside right upper",
        fontsize=8,
        title="black edge: Pareto-optimal",
    )
    write_picture(folder / "compression.png", figure)


def main() -> None:
    """Reads the command line."""
    from lm_lightning.cli import command

    command.run(compress)
