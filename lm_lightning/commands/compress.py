"""`compress`: a finished model in; smaller ones, and a table and picture of what each costs and gains, out.

Everything in the table is measured on this machine: time by the network alone, loss and metrics by a `validate` of the
run's own config with the compressed weights.
"""

import csv
import functools
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional

from lm_lightning import hub
from lm_lightning import run as runs
from lm_lightning.errors import UserError
from lm_lightning.run import model_folder

if TYPE_CHECKING:
    from lm_lightning.compression.measures import Measures


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
    """Compresses a finished model without training, and measures what came of it.

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
    from lm_lightning.compression import calibration, measures, recipes

    hub.quiet()
    source = model_folder(model)
    recipe, modules = names(recipe), names(modules)
    chosen = [one for one in recipe or recipes.STEPS if one != "none"]
    for one in chosen:
        recipes.steps_of(one)
    others = {name: model_folder(name) for name in beside}
    own = Path(model) / "config.yaml"
    settings = Path(config) if config else own if own.is_file() else None
    if settings and not settings.is_file():
        raise UserError(f"there is no config {settings}: give that of a run, or one of configs/")
    folder = Path(output) if output else default_folder(Path(model), source)
    targets = {one: folder / one.replace(":", "of").replace("=", "-") for one in chosen}
    there = [target for target in targets.values() if target.exists()]
    if output and there:
        raise UserError(f"{there[0]} exists already: remove it, or name another --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be made ({error.strerror}): name another --output") from error
    inputs = None
    if settings and calibration_batches:  # once for all recipes that begin with the same model
        inputs = functools.cache(functools.partial(calibration.calibrate, settings, batches=calibration_batches))

    def left_out(one: str, error: UserError) -> None:
        if recipe or one not in targets:
            raise error
        print(f"{one}: left out, since {error}", flush=True)

    for one, target in list(targets.items()):
        try:
            recipes.compress(source, one, target, inputs, modules)
            print(f"{one}: {target}", flush=True)
        except UserError as error:
            left_out(one, error)
            del targets[one]
    if not measure:
        return
    rows, metrics, bench = [], [], measures.Bench(source, tokens, seconds, device)
    for one, target in {"none": source, **targets, **others}.items():
        try:
            found = evaluate(settings, source, target, device) if settings else {}
        except UserError as error:
            left_out(one, error)
            continue
        metrics.append(found)
        rows.append(bench.measure(one, target, found.get("val/loss", math.nan)))
        print(f"{one}: measured", flush=True)
    write(rows, metrics, measures.pareto(rows), folder)
    print((folder / "compression.md").read_text(encoding="utf-8"))
    print(f"table: {folder / 'compression.md'}")


def names(given: Sequence[str]) -> list[str]:
    """Names of an option, also of a list that YAML does not read as one: 2:4 is a number to it, *mlp* an alias."""
    if not isinstance(given, str):
        return list(given)
    return [name for part in given.strip("[] ").split(",") if (name := part.strip(" '\""))]


def in_own_process(model: Path, *flags: str) -> None:
    """Runs the command in a process of its own, which knows nothing of the others of a training run.

    Raises:
        UserError: If it fails; what it prints tells why.
    """
    of_runs = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "NODE_RANK", "MASTER_", "TORCHELASTIC_", "SLURM_")
    own = {name: value for name, value in os.environ.items() if not name.startswith((*of_runs, runs.ENVIRONMENT))}
    command = [sys.executable, "-m", "lm_lightning", "compress", str(model), *flags]
    if subprocess.run(command, env=own, check=False).returncode:
        raise UserError(f"the model is finished, but was not compressed: {' '.join(command[1:])} has failed")


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
            pl_module.separable = False

            def forward(**inputs: Any) -> ModelOutput:
                inputs.pop("use_cache", None)
                return ModelOutput(program(**inputs))  # type: ignore[misc]

            pl_module.network.forward = forward

    if program is None:
        trainer = calibration.run(settings, folder, [], device=device)
    else:
        trainer = calibration.run(settings, source, [InTheNetworksPlace()])
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


MARKERS = "oDs^vP"  # of the picture's points, when ten colors are used up


def write(rows: list["Measures"], metrics: list[dict[str, float]], best: set[str], folder: Path) -> None:
    """Writes `compression.csv` and `.md`, and draws `compression.png` where matplotlib is installed."""
    names = sorted({name for found in metrics for name in found} - {"val/loss"})
    with open(folder / "compression.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow([*rows[0]._fields, *names, "pareto"])
        for row, found in zip(rows, metrics):
            table.writerow([*row, *(found.get(name, "") for name in names), row.recipe in best])
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
    ]
    lines = ["| " + " | ".join([*head, "loss", *names]) + " |", "|---" + "|--:" * (len(head) + len(names)) + "|"]
    for row, found in zip(rows, metrics):
        cells = [
            f"**{row.recipe}**" if row.recipe in best else row.recipe,
            f"{row.parameters:,}" if row.parameters else "",
            f"{row.zeros:.1%}",
            *(f"{own:.1f} ({own / whole:.2f})" for own, whole in zip(row[3:6], rows[0][3:6])),
            *(f"{own:.1f} ({share:.2f})" for own, share in zip(row[6:10], row[10:14])),
            f"{row.loss:.4f}",
            *(f"{found[name]:.4f}" if name in found else "" for name in names),
        ]
        lines.append("| " + " | ".join("" if "nan" in cell else cell for cell in cells) + " |")
    lines += [
        "",
        "In brackets: as a part of the first row's, in turn with it. Bold: no other is smaller, faster and better.",
    ]
    (folder / "compression.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    has_loss = not math.isnan(rows[0].loss)
    fields = {"loss": "loss", "disk": "MiB on disk"} if has_loss else {"disk": "MiB on disk"}
    # The names are beside the panels: at their points they would lie over each other.
    figure = Figure(figsize=(5.5 + 3 * len(fields), max(4.0, 1.0 + 0.25 * len(rows))), layout="constrained")
    panels = figure.subplots(1, len(fields), squeeze=False)[0]
    for axes, (field, label) in zip(panels, fields.items()):
        for number, row in enumerate(rows):
            axes.scatter(
                row.relative_latency_1,
                getattr(row, field),
                color=f"C{number % 10}",
                marker=MARKERS[number // 10 % len(MARKERS)],
                s=60,
                edgecolors="black" if row.recipe in best else "none",
                label=row.recipe.replace("$", "\\$"),
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
    figure.savefig(folder / "compression.png", dpi=120)


def main() -> None:
    """Reads the command line."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="lm_lightning compress", exit_on_error=False)
    parser.add_function_arguments(compress, as_positional=True)  # (`auto_cli` keeps an option --config for itself)
    compress(**vars(parser.parse_args(sys.argv[2:])))
