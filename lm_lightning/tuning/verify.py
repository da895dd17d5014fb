"""`verify`: compares different ways to run a config on this machine with a plain run, in a table.

Each variant is a `fit` in a separate process, with the user's config and flags, the settings that all variants share
(`shared_settings`), and the flags of the variant. Its `metrics.csv` is compared with the one of its base.
"""

import json
import math
import re
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Optional

from lm_lightning import yaml_text
from lm_lightning.callbacks.metrics_reader import read_metrics
from lm_lightning.errors import UserError
from lm_lightning.files import write_text
from lm_lightning.security.redaction import redact_arguments
from lm_lightning.tuning.comparison import comparison_table, machine
from lm_lightning.tuning.fit_process import fit, read_settings, shorten
from lm_lightning.tuning.variants import VARIANTS, Outcome, skip_reason


def verify(
    fit_flags: list[str],
    steps: int = 5,
    only: list[str] | str = (),  # type: ignore[assignment]
    output: Optional[str] = None,
    timeout: float = 600,
) -> bool:
    """Trains a few steps in every way that this machine supports, and compares losses and gradients with a plain run.

    The plain run is a single process in float32 without gradient accumulation. The others train on the same samples, so
    their losses and gradient norms should be equal up to rounding errors. Dropout is disabled because it is random, and
    warm-up because it would hide differences.

    Args:
        fit_flags: Flags of `fit`: `--config` and any other.
        steps: Number of optimizer steps of each variant.
        only: Names of the variants to run, such as ddp,compile. Default: all.
        output: Markdown file to write; the table is always printed.
        timeout: Time limit of each variant, in seconds.

    Returns:
        Whether all variants that can run on this machine are within their tolerance.

    Raises:
        UserError: If the plain run fails, so that there is nothing to compare with.
    """
    from lm_lightning.cli.command import split_list

    if steps < 1:
        raise UserError(f"--steps is {steps}, but must be 1 or more")
    names = split_list(only)
    for name in names:
        if name not in VARIANTS:
            raise UserError(f"there is no variant {name} (--only): use some of {', '.join(VARIANTS)}")
    if output is not None and not Path(output).absolute().parent.is_dir():
        raise UserError(f"the file {output} cannot be written, as its folder does not exist: create the folder")
    chosen = set(names or VARIANTS)
    chosen |= {base for name in chosen if (base := VARIANTS[name].base) is not None}
    names = [name for name in VARIANTS if name in chosen]

    outcomes: dict[str, Outcome] = {}
    try:
        with tempfile.TemporaryDirectory(prefix="verify-", ignore_cleanup_errors=True) as folder:
            settings = shared_settings(fit_flags, steps, Path(folder), timeout)
            for number, name in enumerate(names, 1):
                print(f"{number}/{len(names)} {name}", file=sys.stderr, flush=True)
                reason = skip_reason(VARIANTS[name], settings["data"], outcomes)
                outcomes[name] = (
                    Outcome(reason) if reason else run_variant(name, settings, Path(folder), steps, timeout)
                )
                if name == "plain" and outcomes[name].failed:
                    raise UserError(
                        f"the plain run, with which the others are compared, failed: {outcomes[name].reason}"
                    )
    except BaseException:
        if any(outcome.losses for outcome in outcomes.values()):
            print(comparison_table(outcomes, steps)[0])  # the variants that have finished so far
        raise
    text, good = comparison_table(outcomes, steps)
    print(text)
    if output is not None:
        command = shlex.join(["python", "-m", "lm_lightning", "verify", *redact_arguments(fit_flags)])
        try:
            write_text(Path(output), f"{machine(outcomes)}: `{command}`\n\n{text}\n")
        except OSError as error:
            raise UserError(f"the file {output} cannot be written ({error.strerror})") from error
    return good


def shared_settings(fit_flags: list[str], steps: int, folder: Path, timeout: float) -> dict:
    """Writes `config.yaml` for all variants into `folder` and returns its settings.

    It is the user's config, but with few steps, in float32, and without validation, checkpoints and other loggers,
    which a comparison does not need.
    """
    settings = read_settings(fit_flags, folder, timeout)
    if settings["ckpt_path"] is not None:
        raise UserError("verify cannot resume from --ckpt_path: to start from weights, use --model.pretrained")
    trainer, model = settings["trainer"], settings["model"]["init_args"]
    shorten(settings, steps, [{"class_path": "lm_lightning.callbacks.dropout.NoDropout"}])
    trainer |= {
        "limit_val_batches": 0,
        "val_check_interval": 10**9,  # otherwise an EarlyStopping in the config would need val/loss after an epoch
        "strategy": "auto",
        "precision": "32-true",
    }
    if isinstance(settings["seed_everything"], bool):  # random in each run, or no seed
        settings["seed_everything"] = 1
    data = settings["data"]["init_args"]
    if data.get("max_tokens") is not None:  # the variants divide batches by rows
        data["max_tokens"] = None
    plain = {"compile": False, "activation_checkpointing": 0}
    model |= {name: value for name, value in plain.items() if name in model}
    write_text(folder / "config.yaml", yaml_text.dump(settings))
    return settings


def run_variant(name: str, settings: dict, folder: Path, steps: int, timeout: float) -> Outcome:
    """Runs a variant and reads its metrics."""
    variant = VARIANTS[name]
    parts, batch_size = variant.shares * variant.micro_batches, []
    if parts > 1:
        batch_size = ["--data.batch_size", str(settings["data"]["init_args"]["batch_size"] // parts)]
    out, reason = fit(
        [
            *("--config", str(folder / "config.yaml"), "--runs_dir", str(folder / "runs"), "--name", name),
            *("--trainer.devices", str(variant.processes), "--trainer.num_nodes", str(variant.nodes)),
            *("--trainer.accumulate_grad_batches", str(variant.micro_batches)),
            *(*batch_size, *variant.flags),
        ],
        folder,
        timeout,
        variant.nodes,
    )
    if reason:
        return Outcome(reason, failed=True)
    (file,) = (folder / "runs" / name).glob("*/metrics.csv")
    metrics = {name: [value for _, value in points] for name, points in read_metrics(file).items()}
    losses, norms = (metrics.get(f"train/{name}", []) for name in ("loss", "gradient_norm"))
    if len(losses) != steps:
        return Outcome(f"ended after {len(losses)} steps of {steps}", failed=True)
    if not all(map(math.isfinite, [*losses, *norms])):  # an accelerator ends the run a step late
        return Outcome("its loss or gradient is not finite", failed=True)
    environment = json.loads((file.parent / "environment.json").read_text(encoding="utf-8"))
    device = re.search(r"^device: (\S+)", out, re.MULTILINE)
    return Outcome(
        losses=losses,
        gradient_norms=norms,
        tokens_per_second=statistics.median(metrics["train/tokens_per_second"][1 if steps > 1 else 0 :]),
        memory=max(metrics.get("train/memory", []), default=None),
        environment=environment | {"device": device[1] if device else "cpu"},
    )


def main() -> None:
    """Reads the command line. Exit status 1 means that a variant failed or is outside its tolerance."""
    from lm_lightning.cli import command

    if not command.run(verify, epilog=f"variants: {', '.join(VARIANTS)}"):
        sys.exit(1)
