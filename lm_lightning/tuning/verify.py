"""`verify`: a config in, a table out of how each way to run it on this machine compares with a plain run.

Each variant is a `fit` in a process of its own: of the config with the user's flags and the settings that all variants
share (`shared_settings`), and of the variant's flags. What its `metrics.csv` says is compared with that of its base.
"""

import argparse
import csv
import json
import math
import re
import shlex
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Optional

from lm_lightning.cli.explain import program
from lm_lightning.errors import UserError
from lm_lightning.files import write_text
from lm_lightning.security.redaction import redact_arguments
from lm_lightning.tuning.fits import fit, read_settings, shorten


class Differences(NamedTuple):
    """How far a run is from its base.

    Args:
        first_gradient_norm: Of the gradient's norm at the first step, as a part of it.
        gradient_norm: The largest of any step.
        loss: The largest of any step's loss, in nats a token.
    """

    first_gradient_norm: float
    gradient_norm: float
    loss: float


@dataclass(frozen=True)
class Variant:
    """A way to run a config, and how near its numbers have to be to those of another way, its base.

    Args:
        flags: Of `fit`, beside those that follow from the numbers below.
        processes: How many run on a node, on a GPU each or all on the CPU.
        nodes: How many nodes; this machine plays all of them.
        shares: Into how many parts processes divide a batch; 1 where all processes work on the same samples.
        micro_batches: Into how many parts time divides it.
        base: What it is compared with; None for a base.
        tolerance: Largest accepted differences. Those of the first step are of the gradient alone; later, rounding
            grows with what an optimizer makes of it (Muon, which computes in bf16, a hundred times what AdamW makes).
        option: The option of the data that it needs.
    """

    flags: tuple[str, ...] = ()
    processes: int = 1
    nodes: int = 1
    shares: int = 1
    micro_batches: int = 1
    base: Optional[str] = "plain"
    tolerance: Differences = Differences(first_gradient_norm=1e-4, gradient_norm=1e-2, loss=1e-3)
    option: Optional[str] = None


DOCUMENTS = "--data.mask_documents=true"
VARIANTS = {  # a base comes before what is compared with it
    "plain": Variant(base=None),
    "accumulate": Variant(micro_batches=2),
    "compile": Variant(("--model.compile=true",)),
    "checkpointing": Variant(("--model.activation_checkpointing=1",)),
    "bf16": Variant(("--trainer.precision=bf16-mixed",), tolerance=Differences(0.02, 0.1, 0.05)),
    "documents_eager": Variant((DOCUMENTS, "--model.attention=eager"), base=None, option="mask_documents"),
    "documents": Variant((DOCUMENTS, "--model.attention=sdpa"), base="documents_eager", option="mask_documents"),
    "ddp": Variant(("--trainer.strategy=ddp",), processes=2, shares=2),
    "ddp_accumulate": Variant(("--trainer.strategy=ddp",), processes=2, shares=2, micro_batches=2),
    "ddp_spawn": Variant(("--trainer.strategy=ddp_spawn",), processes=2, shares=2),
    "fsdp2": Variant(("--trainer.strategy=fsdp2",), processes=2, shares=2),
    "hsdp": Variant(("--trainer.strategy=hsdp",), processes=2, nodes=2, shares=4),
    "tp": Variant(("--trainer.strategy=tp",), processes=2),
    "tp_fsdp2": Variant(
        ("--trainer.strategy=lm_lightning.strategies.sharded.TensorParallel", "--trainer.strategy.size=2"),
        processes=4,
        shares=2,
    ),
}


@dataclass
class Outcome:
    """What came of a variant.

    Args:
        reason: Why there are no numbers.
        failed: Whether there should be some.
        losses: Of each step, in nats a token.
        gradient_norms: Of each step.
        tokens_per_second: Of the median step after the first.
        memory: Peak of the first process in GiB; None if unknown.
        environment: What `environment.json` says, and the `device`.
    """

    reason: str = ""
    failed: bool = False
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    tokens_per_second: float = 0.0
    memory: Optional[float] = None
    environment: dict = field(default_factory=dict)


def verify(
    fit_flags: list[str],
    steps: int = 5,
    only: Optional[list[str]] = None,
    output: Optional[str] = None,
    timeout: float = 600,
) -> bool:
    """Runs some steps of a config in each way that this machine has, and prints how they compare with a plain run.

    The plain run is one process in float32 whose micro-batch is the whole batch. The others do the same steps on the
    same samples, so that all should have its loss and gradient norm, but for rounding. Dropout and the warm-up are off,
    since the first differs by nature and the second would hide what differs.

    Args:
        fit_flags: Flags of `fit`: `--config` and any other.
        steps: Optimizer steps of each variant.
        only: Names of variants. Default: all.
        output: Markdown file to write, beside what is printed.
        timeout: Seconds after which a variant has failed.

    Returns:
        Whether all that could run on this machine did so within its tolerance.

    Raises:
        UserError: If there is nothing to compare with, as the plain run fails.
    """
    if steps < 1:
        raise UserError(f"--steps is {steps}, but must be 1 or more")
    for name in only or []:
        if name not in VARIANTS:
            raise UserError(f"there is no variant {name}; the variants are {', '.join(VARIANTS)}")
    if output is not None and not Path(output).absolute().parent.is_dir():
        raise UserError(f"the file {output} cannot be written: make its folder first")
    chosen = set(only or VARIANTS)
    chosen |= {base for name in chosen if (base := VARIANTS[name].base) is not None}
    names = [name for name in VARIANTS if name in chosen]

    outcomes: dict[str, Outcome] = {}
    try:
        with tempfile.TemporaryDirectory(prefix="verify-", ignore_cleanup_errors=True) as folder:
            settings = shared_settings(fit_flags, steps, Path(folder), timeout)
            for number, name in enumerate(names, 1):
                print(f"{number}/{len(names)} {name}", file=sys.stderr, flush=True)
                reason = obstacle(VARIANTS[name], settings["data"], outcomes)
                outcomes[name] = Outcome(reason) if reason else run(name, settings, Path(folder), steps, timeout)
                if name == "plain" and outcomes[name].failed:
                    raise UserError(
                        f"the plain run, with which the others are compared, fails: {outcomes[name].reason}"
                    )
    except BaseException:
        if any(outcome.losses for outcome in outcomes.values()):
            print(report(outcomes, steps)[0])  # what was finished until then
        raise
    text, good = report(outcomes, steps)
    print(text)
    if output is not None:
        command = shlex.join(["python", "-m", "lm_lightning", "verify", *redact_arguments(fit_flags)])
        try:
            write_text(Path(output), f"{machine(outcomes)}: `{command}`\n\n{text}\n")
        except OSError as error:
            raise UserError(f"the file {output} cannot be written ({error.strerror})") from error
    return good


def shared_settings(fit_flags: list[str], steps: int, folder: Path, timeout: float) -> dict:
    """Writes `config.yaml` for all variants into `folder` and returns what is in it.

    It is the user's config, but with the few steps of a comparison, in float32 and without what a comparison does not
    need: validation, checkpoints, other loggers.
    """
    import yaml

    settings = read_settings(fit_flags, folder, timeout)
    if settings["ckpt_path"] is not None:
        raise UserError("verify has no use for --ckpt_path: to start from weights, give --model.pretrained")
    trainer, model = settings["trainer"], settings["model"]["init_args"]
    shorten(settings, steps, [{"class_path": "lm_lightning.callbacks.dropout.NoDropout"}])
    trainer |= {
        "limit_val_batches": 0,
        "val_check_interval": 10**9,  # else an EarlyStopping of the config would ask for val/loss after an epoch
        "strategy": "auto",
        "precision": "32-true",
    }
    if isinstance(settings["seed_everything"], bool):  # drawn anew in each run, or none
        settings["seed_everything"] = 1
    plain = {"compile": False, "activation_checkpointing": 0}
    model |= {name: value for name, value in plain.items() if name in model}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return settings


def obstacle(variant: Variant, data: dict, outcomes: dict[str, Outcome]) -> str:
    """Why a variant cannot be run here, empty if it can.

    Args:
        variant: Which one.
        data: Section of the settings.
        outcomes: Of the variants before it, the first of which has found out what machine this is.
    """
    options = data["init_args"]
    if variant.option is not None and variant.option not in options:
        return f"{data['class_path'].rpartition('.')[2]} has no {variant.option}"
    parts = variant.shares * variant.micro_batches
    if options["batch_size"] % parts:
        return f"data.batch_size {options['batch_size']} is not divisible by {parts}"
    if variant.base is None:
        return ""
    if outcomes[variant.base].reason:
        return f"{variant.base} has no numbers"
    environment = outcomes[variant.base].environment
    kind = environment["device"].partition(":")[0]
    there = math.inf if kind == "cpu" else max(1, len(environment["gpus"]))
    if variant.nodes > 1 and kind != "cpu":
        return f"needs {variant.nodes} nodes, which processes on a CPU alone can play (--trainer.accelerator cpu)"
    if variant.processes > there:
        return f"needs {variant.processes} GPUs, this machine has {there} (or --trainer.accelerator cpu)"
    return ""


def run(name: str, settings: dict, folder: Path, steps: int, timeout: float) -> Outcome:
    """Runs a variant and reads what it has logged."""
    variant = VARIANTS[name]
    batch_size = settings["data"]["init_args"]["batch_size"] // (variant.shares * variant.micro_batches)
    out, reason = fit(
        [
            *("--config", str(folder / "config.yaml"), "--runs_dir", str(folder / "runs"), "--name", name),
            *("--trainer.devices", str(variant.processes), "--trainer.num_nodes", str(variant.nodes)),
            *("--trainer.accumulate_grad_batches", str(variant.micro_batches), "--data.batch_size", str(batch_size)),
            *variant.flags,
        ],
        folder,
        timeout,
        variant.nodes,
    )
    if reason:
        return Outcome(reason, failed=True)
    (file,) = (folder / "runs" / name).glob("*/metrics.csv")
    with open(file, newline="", encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if row["train/loss"]]
    if len(rows) != steps:
        return Outcome(f"ended after {len(rows)} steps of {steps}", failed=True)
    losses, norms = ([float(row[f"train/{key}"]) for row in rows] for key in ("loss", "gradient_norm"))
    if not all(map(math.isfinite, [*losses, *norms])):  # an accelerator ends the run a step late
        return Outcome("its loss or gradient is not finite", failed=True)
    environment = json.loads((file.parent / "environment.json").read_text(encoding="utf-8"))
    device = re.search(r"^device: (\S+)", out, re.MULTILINE)
    return Outcome(
        losses=losses,
        gradient_norms=norms,
        tokens_per_second=statistics.median(float(row["train/tokens_per_second"]) for row in rows[1:] or rows),
        memory=max((float(row["train/memory"]) for row in rows if row.get("train/memory")), default=None),
        environment=environment | {"device": device[1] if device else "cpu"},
    )


def differences(outcome: Outcome, base: Outcome) -> Differences:
    """How far the logged numbers of a variant are from those of its base."""
    norms = [abs(a - b) / b for a, b in zip(outcome.gradient_norms, base.gradient_norms)]
    losses = [abs(a - b) for a, b in zip(outcome.losses, base.losses)]
    return Differences(norms[0], max(norms), max(losses))


def report(outcomes: dict[str, Outcome], steps: int) -> tuple[str, bool]:
    """The table with its legend, valid as Markdown, and whether all is well in it."""
    head = ["variant", "processes", "micro-batches", "first gradient", "gradient", "loss", "tokens/s", "GiB", "result"]
    rows, notes, good = [head], [], True
    for name, outcome in outcomes.items():
        variant = VARIANTS[name]
        nodes = f"{variant.nodes} nodes x " if variant.nodes > 1 else ""
        row = [name, f"{nodes}{variant.processes}", str(variant.micro_batches)]
        if outcome.reason:
            result = "failed" if outcome.failed else "not run"
            notes.append(f"- {name} {result}: {outcome.reason}")
            good = good and not outcome.failed
            rows.append([*row, "", "", "", "", "", result])
            continue
        found, result = ["", "", ""], "base"
        if variant.base is not None:
            distance = differences(outcome, outcomes[variant.base])
            within = all(value <= limit for value, limit in zip(distance, variant.tolerance))
            good = good and within
            found = [f"{value:.1e}" for value in distance]
            result = f"{'within' if within else 'OUTSIDE'} {', '.join(f'{limit:g}' for limit in variant.tolerance)}"
        memory = "" if outcome.memory is None else f"{outcome.memory:.2f}"
        rows.append([*row, *found, f"{outcome.tokens_per_second:,.0f}", memory, result])
    legend = (
        f"Largest differences in {steps} steps from the plain run, of documents from documents_eager: of the gradient "
        "norm as a part of it (at the first, before an optimizer has made more of rounding, and at any), and of the "
        "loss in nats a token. Tokens a second are the median step's, GiB the peak of the first process."
    )
    return "\n".join([*markdown(rows), "", legend, *([""] if notes else []), *notes]), good


def markdown(rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table that is aligned as text, too; its first and last columns are words, others numbers."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    words = (0, len(widths) - 1)
    rule = ["-" * width if i in words else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = [rows[0], rule, *rows[1:]]
    aligned = [[c.ljust(w) if i in words else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths))] for r in lines]
    return [f"| {' | '.join(cells)} |" for cells in aligned]


def machine(outcomes: dict[str, Outcome]) -> str:
    """One line on hardware and versions."""
    environment = next((outcome.environment for outcome in outcomes.values() if outcome.environment), None)
    if environment is None:
        return "Nothing has run"
    hardware = environment["gpus"] or [f"CPU with {environment['threads']} threads"]
    versions = [f"{name} {environment[name]}" for name in ("python", "torch", "lightning", "transformers")]
    return ", ".join([environment["platform"], *hardware, *versions])


def main() -> None:
    """Reads the command line. Exit status 1 says that a variant failed or is outside its tolerance."""
    parser = argparse.ArgumentParser(
        prog=program("verify"),
        usage="%(prog)s --config CONFIG [any flag of fit] [options]",
        description=(verify.__doc__ or "").split("\n\n    Args:")[0].replace("\n    ", "\n"),
        epilog=f"variants: {', '.join(VARIANTS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--steps", type=int, default=5, help="Optimizer steps of each variant. Default: 5.")
    parser.add_argument("--only", type=lambda text: text.split(","), help="Variants, as ddp,compile. Default: all.")
    parser.add_argument("--output", metavar="FILE", help="Markdown file to write.")
    parser.add_argument("--timeout", type=float, default=600, help="Seconds a variant may take. Default: 600.")
    given, fit_flags = parser.parse_known_args(sys.argv[2:])
    if not verify(fit_flags, **vars(given)):
        sys.exit(1)
