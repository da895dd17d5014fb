"""`compress`: a finished model in; smaller ones, and a table and picture of what each costs and gains, out.

Everything in the table is measured on this machine: time by the network alone, loss and metrics by a `validate` of the
run's own config with the compressed weights.
"""

import contextlib
import csv
import io
import logging
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

from lm_lightning import hub
from lm_lightning.errors import UserError
from lm_lightning.run import model_folder

if TYPE_CHECKING:
    from torch import Tensor

WRITTEN = 32  # tokens of a GPT


class Measures(NamedTuple):
    """What is measured of a model; NaN where it cannot be.

    Attributes:
        recipe: How it was made.
        parameters: Of the network.
        zeros: Share of the weights in the blocks' linear layers that are zero.
        disk: MiB of its weights' files.
        memory: MiB of its parameters and buffers.
        latency_1: Milliseconds of a forward pass, one row.
        latency_8: The same with eight rows.
        decode_1: Tokens a second that a GPT writes, one row.
        decode_8: The same of eight rows together.
        relative_latency_1: That latency as a part of the uncompressed model's, which runs in turn with it, so that
            whatever else the machine does slows down both.
        relative_latency_8: The same with eight rows.
        relative_decode_1: The same of the tokens a second.
        relative_decode_8: The same with eight rows.
        loss: Of the run's validation split.
    """

    recipe: str
    parameters: int
    zeros: float
    disk: float
    memory: float
    latency_1: float
    latency_8: float
    decode_1: float
    decode_8: float
    relative_latency_1: float
    relative_latency_8: float
    relative_decode_1: float
    relative_decode_8: float
    loss: float


def compress(
    model: str,
    recipe: list[str] | str = (),  # type: ignore[assignment]
    output: Optional[str] = None,
    config: Optional[str] = None,
    tokens: int = 64,
    seconds: float = 2.0,
) -> None:
    """Compresses a finished model without training, and measures what came of it.

    The recipes are int8, int8-weights (torchao), bnb-int8, nf4, fp4 (bitsandbytes), sparse=0.5, 2:4, width=0.5,
    layers=0.5, onnx and onnx-int8; several steps with + between, such as width=0.5+int8.

    Args:
        model: Run folder or `from_pretrained` folder.
        recipe: One, or more as `[int8, nf4, width=0.5+int8]`. Default: each one, as far as it fits the network.
        output: Folder of the compressed models, the table and the picture, which may not have any of them yet.
            Default: `compressed` in the run folder, or one beside the model's; older ones there are replaced.
        config: Config of a run, with whose data the loss is measured. Default: that of the run folder.
        tokens: Of each row of the timed passes.
        seconds: How long each time is measured.
    """
    from lm_lightning import compression

    hub.quiet()
    logging.getLogger("bitsandbytes.autograd").setLevel(logging.ERROR)  # of each layer in each pass
    source = model_folder(model)
    recipes = ([recipe] if isinstance(recipe, str) else list(recipe)) or list(compression.STEPS)
    for one in recipes:
        compression.steps_of(one)
    own = Path(model) / "config.yaml"
    settings = Path(config) if config else own if own.is_file() else None
    folder = Path(output) if output else default_folder(Path(model), source)
    targets = {one: folder / one.replace(":", "of").replace("=", "-") for one in recipes}
    there = [target for target in targets.values() if target.exists()]
    if output and there:
        raise UserError(f"{there[0]} exists already: remove it, or name another --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be made ({error.strerror}): name another --output") from error
    rows, metrics = [], []
    base = calls(source, compression.load(source), tokens)
    for one in ["none", *recipes]:
        target = targets.get(one, source)
        try:
            if one != "none":
                compression.compress(source, one, target)
            found = evaluate(settings, source, target) if settings else {}
        except UserError as error:
            if recipe or one == "none":
                raise
            print(f"{one}: left out, since {error}", flush=True)
            continue
        metrics.append(found)
        rows.append(measure(one, target, base, tokens, seconds, found.get("val/loss", math.nan)))
        print(f"{one}: {'measured' if one == 'none' else target}", flush=True)
    best = pareto(rows)
    write(rows, metrics, best, folder)
    print((folder / "compression.md").read_text(encoding="utf-8"))
    print(f"table: {folder / 'compression.md'}")


def default_folder(model: Path, source: Path) -> Path:
    """`compressed` in a run folder, else beside the model's."""
    return source.with_name(f"{source.name}-compressed") if model == source else model / "compressed"


def evaluate(settings: Path, source: Path, folder: Path) -> dict[str, float]:
    """The metrics of a run's validation split, with the weights of a folder."""
    from lightning.pytorch import Callback, LightningModule, Trainer
    from transformers.utils import ModelOutput

    from lm_lightning import compression
    from lm_lightning.cli import CLI

    class InTheNetworksPlace(Callback):
        """Has an ONNX model give the outputs."""

        def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            running = compression.session(folder)
            pl_module.separable = False

            def forward(**inputs: Any) -> ModelOutput:
                inputs.pop("use_cache", None)
                return ModelOutput(compression.run_onnx(running, inputs))

            pl_module.network.forward = forward

    onnx = (folder / compression.ONNX).is_file()
    with tempfile.TemporaryDirectory() as runs:
        flags = ["--config", str(settings), "--runs_dir", runs, "--name", "compressed", "--ckpt_path", "null"]
        weights = ["--model.network", "null", "--model.pretrained", str(source if onnx else folder)]
        plain = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.strategy", "auto"]
        plain += ["--trainer.precision", "32-true", "--model.compile", "false", "--trainer.callbacks", "null"]
        with contextlib.redirect_stdout(io.StringIO()):  # of one run each recipe
            cli = CLI(["validate", *flags, *weights, *plain], [InTheNetworksPlace()] if onnx else [])
        return {name: float(value) for name, value in cli.trainer.callback_metrics.items()}


def calls(folder: Path, running: Any, tokens: int) -> dict[str, Callable[[], Any]]:
    """What is timed of a model: a pass of one and of eight rows, and of a GPT also the writing of 32 tokens.

    Args:
        folder: Of the model.
        running: Its network, or what runs its ONNX file.
        tokens: Of each row.
    """
    import torch
    import transformers

    from lm_lightning import compression

    vocabulary = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).vocab_size
    found: dict[str, Callable[[], Any]] = {}
    for size in (1, 8):
        ids = torch.randint(vocabulary, (size, tokens), generator=torch.Generator().manual_seed(0))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if not hasattr(running, "forward"):
            found[f"latency_{size}"] = partial(compression.run_onnx, running, inputs)
            continue
        found[f"latency_{size}"] = torch.no_grad()(partial(running, **inputs))
        if running.can_generate():
            settings = {"do_sample": False, "min_new_tokens": WRITTEN, "max_new_tokens": WRITTEN, "pad_token_id": 0}
            prompts = {name: tensor[:, :8] for name, tensor in inputs.items()}
            found[f"decode_{size}"] = partial(running.generate, **prompts, **settings)
    return found


def measure(
    recipe: str, folder: Path, base: dict[str, Callable[[], Any]], tokens: int, seconds: float, loss: float
) -> Measures:
    """Measures a model of a folder, whose times are compared with those of `base`, see `calls`."""
    from lm_lightning import compression
    from lm_lightning.models.network import linear_layers, zeros_of

    disk = sum(f.stat().st_size for f in folder.iterdir() if f.suffix in (".safetensors", ".onnx")) / 2**20
    onnx = (folder / compression.ONNX).is_file()
    network: Any = compression.session(folder) if onnx else compression.load(folder)
    times = dict.fromkeys(Measures._fields[5:-1], math.nan)
    for name, call in calls(folder, network, tokens).items():
        own, other = timed(call, base[name], seconds)
        if name.startswith("decode"):  # tokens a second
            own, other = (1000 * WRITTEN * int(name[-1]) / value for value in (own, other))
        times[name], times[f"relative_{name}"] = own, own / other
    if onnx:
        return Measures(recipe, 0, math.nan, disk, disk, *times.values(), loss=loss)  # type: ignore[misc]
    memory = sum(bytes_of(tensor) for tensor in [*network.parameters(), *network.buffers()]) / 2**20
    try:
        zeros, weights = zeros_of(linear_layers(network))
        share = zeros / weights
    except (RuntimeError, NotImplementedError):  # of quantized ones
        share = math.nan
    return Measures(recipe, network.num_parameters(), share, disk, memory, *times.values(), loss=loss)  # type: ignore[misc]


def bytes_of(tensor: "Tensor") -> int:
    """What a tensor takes in memory; one of torchao is made of several."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(bytes_of(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def timed(call: Callable[[], Any], other: Callable[[], Any], seconds: float) -> tuple[float, float]:
    """The median times of two calls in milliseconds, which are made in turn for some seconds, three times at least."""
    times: tuple[list[float], list[float]] = ([], [])
    call(), other()
    end = time.perf_counter() + seconds
    while len(times[0]) < 3 or time.perf_counter() < end:
        for own, one in zip(times, (call, other)):
            start = time.perf_counter()
            one()
            own.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[0]), statistics.median(times[1])


def pareto(rows: list[Measures]) -> set[str]:
    """The recipes to which no other is at least equal in size, latency and loss, and better in one of them."""

    def values(row: Measures) -> tuple[float, float, float]:
        return row.disk, row.relative_latency_1, -math.inf if math.isnan(row.loss) else row.loss

    def better(one: Measures, other: Measures) -> bool:
        pairs = list(zip(values(one), values(other)))
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    return {row.recipe for row in rows if not any(better(other, row) for other in rows)}


def write(rows: list[Measures], metrics: list[dict[str, float]], best: set[str], folder: Path) -> None:
    """Writes `compression.csv` and `.md`, and draws `compression.png` where matplotlib is installed."""
    names = sorted({name for found in metrics for name in found} - {"val/loss"})
    with open(folder / "compression.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow([*Measures._fields, *names, "pareto"])
        for row, found in zip(rows, metrics):
            table.writerow([*row, *(found.get(name, "") for name in names), row.recipe in best])
    head = [
        "recipe",
        "parameters",
        "zeros",
        "MiB on disk",
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
            *(f"{own:.1f} ({own / whole:.2f})" for own, whole in zip(row[3:5], rows[0][3:5])),
            *(f"{own:.1f} ({share:.2f})" for own, share in zip(row[5:9], row[9:13])),
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
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    has_loss = not math.isnan(rows[0].loss)
    panels = figure.subplots(1, 2 if has_loss else 1, squeeze=False)[0]
    for axes, field, label in (
        zip(panels, ("loss", "disk"), ("loss", "MiB on disk")) if has_loss else [(panels[0], "disk", "MiB on disk")]
    ):
        for row in rows:
            colour = "tab:blue" if row.recipe in best else "tab:gray"
            axes.scatter(row.relative_latency_1, getattr(row, field), color=colour)
            axes.annotate(
                row.recipe,
                (row.relative_latency_1, getattr(row, field)),
                fontsize=8,
                xytext=(4, 3),
                textcoords="offset points",
            )
        axes.set(xlabel="time of a pass, 1 row, as a part of the uncompressed model's", ylabel=label)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    figure.savefig(folder / "compression.png", dpi=120)


def main() -> None:
    """Reads the command line."""
    from jsonargparse import auto_cli

    auto_cli(compress, args=sys.argv[2:], prog="lm_lightning compress", exit_on_error=False)
