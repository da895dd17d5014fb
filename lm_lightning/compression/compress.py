"""`compress`: makes smaller versions of a trained model, and measures their size, speed and quality.

Everything in the table is measured on this machine: times with the network alone, loss and metrics by `validate` with
the run's config and the compressed weights.
"""

import functools
import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Optional

from lm_lightning.compat.transformers import hide_load_report
from lm_lightning.compression.results import Results, Row, files_of
from lm_lightning.console import printable
from lm_lightning.errors import UserError, one_line
from lm_lightning.run import model_folder
from lm_lightning.security import imports
from lm_lightning.security.untrusted import refuse_links

if TYPE_CHECKING:
    from lm_lightning.compression.calibration import Calibration

UNCOMPRESSED = "none"  # instead of a recipe


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
    """Compresses a trained model, without further training, and measures the result.

    If a recipe fails, the table has the reason in its row, the other recipes are still run, and the exit status is 2.
    After a failure or an interruption, the same command runs only what is missing. After success, it runs everything
    again.

    Args:
        model: Run folder or `from_pretrained` folder.
        recipe: One recipe or a list such as `[int8, nf4]`. Quantization with torchao: int8, int8-weights,
            float8-weights (on GPUs also float8 and int4-weights); with bitsandbytes: bnb-int8, nf4, fp4. Weights that
            become zero: sparse=0.5, 2:4, wanda=0.5, wanda-2:4. Smaller networks: width=0.5, heads=0.5, layers=0.5.
            Other formats: onnx, onnx-int8, onnx-int8-blocks, onnx-int4, pt2. `+` combines steps, as in width=0.5+int8;
            `none` only measures the model. Default: every recipe that the network supports.
        output: Folder for the compressed models, the table and the plot; it must not contain any of the models yet.
            Default: `compressed` in the run folder or beside the model's folder, where older models are replaced.
        config: Config of a run whose data is used to measure the loss. Default: the config in the run folder.
        beside: More models to measure, such as one that was trained further after compression.
        modules: Patterns for the names of the linear layers whose weights are made zero or quantized, such as `*mlp*`.
            Default: all linear layers in the blocks.
        calibration_batches: Number of training batches from which importance scores are computed; with 0, they are
            computed from the weights alone. The wanda recipes need at least one batch.
        tokens: Number of tokens per row when time is measured.
        seconds: Duration of each measurement of time.
        device: Device on which time is measured.
        measure: Whether to measure the models, or only to write them.
    """
    from lm_lightning.cli.command import split_list
    from lm_lightning.compression import evaluation, recipes

    for name, value, least in (("calibration_batches", calibration_batches, 0), ("tokens", tokens, 1)):
        if value < least:
            raise UserError(f"--{name} is {value}, but must be {least} or more")
    hide_load_report()
    source = model_folder(model)
    recipe, modules = split_list(recipe), split_list(modules)
    chosen = [one for one in recipe or recipes.STEPS if one != UNCOMPRESSED]
    for one in chosen:
        recipes.steps_of(one)
    others = {name: model_folder(name) for name in beside}
    settings = config_of(Path(model), config)
    folder = Path(output) if output else default_folder(Path(model), source)
    refuse_links(Path(model) if folder.parent == Path(model) else folder)
    targets = {one: folder / one.replace(":", "of").replace("=", "-") for one in chosen}
    inputs = {
        "model": files_of(source),
        "config": hashlib.sha256(settings.read_bytes()).hexdigest() if settings else None,
        "options": [modules, calibration_batches, tokens, seconds, device],
    }
    results = Results(folder, inputs)
    existing = [target for one, target in targets.items() if target.exists() and not results.made(one, target)]
    if output and existing:
        raise UserError(f"{existing[0]} exists already: remove it, or give another --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {folder} ({error.strerror}): give another --output") from error
    calibration = None
    if settings and calibration_batches:  # once for all recipes that begin with the same model
        calibration = functools.cache(functools.partial(evaluation.calibrate, settings, batches=calibration_batches))

    job = Job(source, targets, others, results, skip_misfits=not recipe)
    job.make(calibration, modules)
    if measure and (not targets or len(results.errors()) < len(targets)):
        job.measure(folder, settings, tokens, seconds, device)
    if errors := results.errors():
        raise UserError(
            f"{len(errors)} of {len(targets) + len(others)} models failed (run the same command to try them again): "
            + "; ".join(f"{one}: {reason}" for one, reason in errors.items())
        )
    results.save(complete=True)


class Job:
    """Makes and measures models; if one fails, its row has the reason.

    Args:
        source: Folder of the uncompressed model.
        targets: Folders of the compressed models, by their recipes.
        others: Folders of the other models to measure, by their names.
        results: Stores the rows.
        skip_misfits: Whether to skip recipes that the network does not support, without a row.
    """

    def __init__(
        self, source: Path, targets: dict[str, Path], others: dict[str, Path], results: Results, skip_misfits: bool
    ) -> None:
        self.source, self.targets, self.results, self.skip_misfits = source, targets, results, skip_misfits
        self.models = {UNCOMPRESSED: source, **targets, **others}
        self.skipped: list[str] = []

    def make(self, calibration: "Optional[Calibration]", modules: list[str]) -> None:
        """Makes the compressed models that do not exist yet.

        Args:
            calibration: Measures networks; None if there is no data.
            modules: Patterns of the names of linear layers; empty for all.
        """
        from lm_lightning.compression import recipes

        for one, target in self.targets.items():
            if self.results.made(one, target):
                print(f"{one}: {target} exists already", flush=True)
                continue
            try:
                recipes.compress(self.source, one, target, calibration, modules)
            except Exception as error:  # libraries raise all types of errors
                self.failed(one, error)
            else:
                self.results.add(Row(one, files_of(target)))
                print(f"{one}: {target}", flush=True)

    def measure(self, folder: Path, settings: Optional[Path], tokens: int, seconds: float, device: str) -> None:
        """Measures the models that are not measured yet, and writes and prints the table.

        Args:
            folder: Folder for the table and the plot.
            settings: Config of the run whose data is used to measure the loss; None to not measure it.
            tokens: See `compress`.
            seconds: See `compress`.
            device: See `compress`.
        """
        from lm_lightning.compression import evaluation, measures, table

        bench = measures.Bench(self.source, tokens, seconds, device)
        for one, target in self.models.items():
            if one in self.skipped or one in self.results.errors() or self.results.measured(one, target):
                continue
            try:
                found = evaluation.metrics(settings, self.source, target, device) if settings else {}
                row = bench.measure(one, target, found.get("val/loss", math.nan))
            except Exception as error:
                if one == UNCOMPRESSED:  # the others are compared with it
                    raise
                self.failed(one, error)
                continue
            self.results.add(Row(one, files_of(target), row._asdict(), found))
            table.write(self.rows(), folder)
            print(f"{one}: measured", flush=True)
        table.write(self.rows(), folder)
        table.plot(self.rows(), folder)
        print(printable((folder / "compression.md").read_text(encoding="utf-8")))
        print(f"table: {folder / 'compression.md'}")

    def rows(self) -> list[Row]:
        """The rows so far, in the order of the models."""
        return [self.results.rows[name] for name in self.models if name in self.results.rows]

    def failed(self, one: str, error: Exception) -> None:
        """Prints and stores the reason why a model could not be made or measured."""
        imports.check()
        reason = one_line(error)
        if isinstance(error, UserError) and self.skip_misfits and one in self.targets:
            print(printable(f"{one}: skipped: {reason}"), flush=True)
            self.skipped.append(one)
            return
        reason = reason if isinstance(error, UserError) else f"{type(error).__name__}: {reason}"
        print(printable(f"{one}: failed: {reason}"), flush=True)
        self.results.add(Row(one, files_of(self.models[one]), error=reason))


def config_of(model: Path, config: Optional[str]) -> Optional[Path]:
    """The config whose data is used to measure a model: the given one or the one in its run folder, if any."""
    if config:
        if not Path(config).is_file():
            raise UserError(f"there is no config {config}: give the config of a run, or one in configs/")
        return Path(config)
    own = model / "config.yaml"
    if not own.is_file():
        return None
    imports.restrict(own)
    return own


def default_folder(model: Path, source: Path) -> Path:
    """`compressed` in the run folder, or beside the folder of a model without a run."""
    return source.with_name(f"{source.name}-compressed") if model == source else model / "compressed"


def main() -> None:
    """Reads the command line."""
    from lm_lightning.cli import command

    command.run(compress)
