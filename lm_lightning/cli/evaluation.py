"""Evaluations: the run, settings and weights that `validate`, `test` and `predict` use, and the files that they write.

The settings are those of the run's config.yaml, overridden by flags of the command line; the weights are those of its
`model/`, unless a checkpoint is given; the tokenizer is the one that the run saved.
"""

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Optional

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser

from lm_lightning import run as runs
from lm_lightning.checkpoints.loading import Checkpoint, CheckpointFolder, checkpoint_folder, find_checkpoint, run_of
from lm_lightning.cli import saving, settings
from lm_lightning.cli.explain import EVALUATIONS as COMMANDS
from lm_lightning.console import printable
from lm_lightning.data import contract
from lm_lightning.errors import UserError
from lm_lightning.files import write_text
from lm_lightning.security.redaction import redact
from lm_lightning.security.untrusted import read_json

RECORD = "evaluation.json"
SPLITS = {"validate": "validation", "test": "test", "predict": "predict"}


def replace_run_argument(arguments: list[str]) -> tuple[Optional[Path], list[str]]:
    """Replaces the run in `validate RUN ...` by its config file.

    Args:
        arguments: The subcommand and its arguments.

    Returns:
        The run folder, or None if the arguments do not contain one; and the arguments for the parser.

    Raises:
        UserError: If the argument is not a run.
    """
    if arguments[:1] == [] or arguments[0] not in COMMANDS or len(arguments) < 2 or arguments[1].startswith("-"):
        return None, arguments
    command, name, *rest = arguments
    run = runs.find_run(name)
    if name.rstrip("/").endswith(".ckpt"):
        rest = ["--ckpt_path", str(Path(name).expanduser()), *rest]
    return run, [command, "--config", str(run / "config.yaml"), *rest]


def find_evaluated_run(config: Any, name: str) -> Optional[Path]:
    """The run to which `ckpt_path` or `model.pretrained` belongs; None if they do not belong to a run.

    Args:
        config: Options of the subcommand.
        name: Name of the experiment.

    Raises:
        UserError: If the checkpoint does not exist.
    """
    if record := record_of(config.config):
        run = read_json(record).get("run")
        return Path(run) if isinstance(run, str) and run else None
    if config.ckpt_path is not None:
        return run_of(checkpoint_folder(config.ckpt_path, config.runs_dir, name) / "last.ckpt")
    pretrained = options_of(config, "model").get("pretrained")
    if pretrained is not None and runs.is_run(folder := Path(pretrained).expanduser()):
        return folder.absolute()
    return None


def options_of(config: Any, part: str) -> Any:
    """The options of the model or the data."""
    return config[part].get("init_args") or {}


def use_config_of(run: Path, arguments: list[str]) -> list[str]:
    """Replaces the configs in the arguments of an evaluation by the config of a run."""
    return [arguments[0], "--config", str(run / "config.yaml"), *settings.read_layered(arguments[1:])[2]]


def record_of(configs: Any) -> Optional[Path]:
    """The `evaluation.json` of the evaluation whose saved config is among the given ones; None if there is none."""
    files = [Path(str(config)).parent / RECORD for config in configs or []]
    return next((file for file in files if file.is_file()), None)


def differences(ours: Any, other: Any, name: str) -> Iterator[str]:
    """The names of options that have different values in two configs."""
    if hasattr(ours, "items") and hasattr(other, "items"):
        mine, others = dict(ours.items()), dict(other.items())
        for key in mine.keys() & others.keys():
            yield from differences(mine[key], others[key], f"{name}.{key}".replace(".init_args", ""))
    elif ours != other:
        yield name


class Weights(NamedTuple):
    """The weights that are evaluated.

    `name` is a folder, a checkpoint or a name on the Hub; `network` is the description of a checkpoint's network.
    """

    name: str
    network: Optional[dict[str, Any]] = None


def choose_weights(config: Any, run: Optional[Path], command: str) -> Weights:
    """Chooses the weights of an evaluation, and sets the options that load them.

    Args:
        config: Options of the subcommand; changed in place.
        run: The run that is evaluated; None if the weights do not belong to a run.
        command: The subcommand.

    Raises:
        UserError: If there are no weights, or they are damaged.
    """
    if run is not None and not record_of(config.config):
        return choose_run_weights(config, run)
    if config.ckpt_path is not None:
        folder = checkpoint_folder(config.ckpt_path, config.runs_dir, config.name)
        return use_checkpoint(config, find_checkpoint(config.ckpt_path, folder))
    if pretrained := (config.model.get("init_args") or {}).get("pretrained"):
        return Weights(pretrained)
    raise UserError(
        f"{command} needs trained weights: give a run, as in `{command} RUN`, --ckpt_path last or a checkpoint, or "
        "--model.pretrained"
    )


def use_checkpoint(config: Any, checkpoint: Checkpoint) -> Weights:
    """Sets the options of an evaluation so that it loads a checkpoint."""
    config.ckpt_path = str(checkpoint.path.absolute())
    return Weights(config.ckpt_path, checkpoint.content["network"])


def choose_run_weights(config: Any, run: Path) -> Weights:
    """Sets the options for the weights and the tokenizer of a run, unless the user has set them.

    Args:
        config: Options of the subcommand; changed in place.
        run: Run folder.

    Raises:
        UserError: If the run has no weights, or they are damaged.
    """
    saved = settings.read(str(run / "config.yaml"))
    saved_model, saved_data = (saved[part].get("init_args") or {} for part in ("model", "data"))
    data, model = options_of(config, "data"), options_of(config, "model")
    tokenizer = data.get("tokenizer")
    if hasattr(tokenizer, "path") and tokenizer.as_dict() == (saved_data.get("tokenizer") or {}):
        tokenizer.path, tokenizer.min_count = str(run / "tokenizer"), 0
    if config.ckpt_path is not None:
        return use_checkpoint(config, find_checkpoint(config.ckpt_path, run / "checkpoints"))
    pretrained = model.get("pretrained")
    if pretrained is not None and Path(pretrained).expanduser().absolute() == run:  # the option that named the run
        pretrained = model["pretrained"] = saved_model.get("pretrained")
    if pretrained is not None and pretrained != saved_model.get("pretrained"):  # the run's settings, other weights
        if "network" in model and model["network"] == saved_model.get("network"):
            model["network"] = None
        return Weights(str(pretrained))
    if "pretrained" in model and (run / "model" / "config.json").is_file():
        model["pretrained"] = str(run / "model")
        for key, value in {"network": None, "adapter": None, "keep_head": False}.items():
            if key in model:
                model[key] = value
        return Weights(str(run / "model"))
    if not (run / "checkpoints").is_dir():
        raise UserError(f"{run} has neither model/ nor checkpoints/, so there is nothing to evaluate: train it first")
    return use_checkpoint(config, CheckpointFolder(run / "checkpoints").exported())


def files_of(config: Any) -> dict[str, Any]:
    """The options that name the data, except those that are not set."""
    options = options_of(config, "data")
    names = ("corpus", "corpora", "tables", "parallel", "retrieval", "texts")
    return {name: without_unset(options[name]) for name in names if options.get(name)}


def without_unset(value: Any) -> Any:
    """Options as dicts, without those that are not set."""
    value = value.as_dict() if hasattr(value, "as_dict") else value
    return {name: without_unset(item) for name, item in value.items() if item} if isinstance(value, dict) else value


class Evaluation(Callback):
    """Writes the files of an evaluation into its folder: `config.yaml`, and `evaluation.json` with the metrics.

    Args:
        parser: Writes the config.
        config: The settings of the evaluation.
        run: Run folder; None if the weights do not belong to a run.
        weights: Folder, checkpoint or Hub name of the weights.
    """

    def __init__(self, parser: LightningArgumentParser, config: Any, run: Optional[Path], weights: str) -> None:
        self.parser, self.config = parser, config
        about = Path(weights) / runs.TRAINING  # in the model/ of a run; names the checkpoint
        self.about = read_json(about) if weights and about.is_file() else None
        if self.about is not None and not (
            type(self.about.get("step")) is int and isinstance(self.about.get("checkpoint"), str)
        ):
            raise UserError(f"{about} is damaged, as it does not name a checkpoint and its step: remove the file")
        self.record: dict[str, Any] = {"run": run and str(run), "weights": weights, "model": self.about}

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes both files, without metrics, when all checks have passed."""
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        folder, command = Path(trainer.default_root_dir), trainer.state.fn.value if trainer.state.fn else ""
        saving.write(self.parser, self.config, folder / "config.yaml")
        self.record = {
            "command": command,
            **self.record,
            "split": SPLITS[command],
            "started": datetime.now().isoformat(timespec="seconds"),
            "files": files_of(self.config),
            "data": contract.optional(trainer.datamodule, "info"),
            "metrics": None,
        }
        self.write(trainer)

    def end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds the metrics."""
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        self.record["metrics"] = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.write(trainer)
        print(f"evaluation: {Path(trainer.default_root_dir) / RECORD}")

    on_validation_start = on_test_start = on_predict_start = start
    on_validation_end = on_test_end = on_predict_end = end

    def weights(self) -> str:
        """The origin of the weights, as text."""
        where = self.record["weights"]
        return (
            f"{where} ({printable(str(self.about.get('checkpoint')))} checkpoint, step {self.about['step']:,})"
            if self.about
            else where
        )

    def write(self, trainer: Trainer) -> None:
        """Writes the record atomically."""
        file = Path(trainer.default_root_dir) / RECORD
        write_text(file, json.dumps(redact(self.record), indent=2, ensure_ascii=False))
