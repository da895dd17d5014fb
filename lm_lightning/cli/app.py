"""The LightningCLI: options in, a run folder, a trainer and its parts out."""

import ast
import contextlib
import dataclasses
import inspect
import json
import linecache
import logging
import os
import sys
import traceback
import typing
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import lightning
import torch
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lm_lightning import features, files, hub, strategies
from lm_lightning import run as runs
from lm_lightning.callbacks.ending import Ending, check_after_validation
from lm_lightning.callbacks.export import Export, Weights
from lm_lightning.callbacks.fit_loop import FitLoop
from lm_lightning.callbacks.gradients import Gradients  # noqa: F401
from lm_lightning.callbacks.monitors import Monitors
from lm_lightning.callbacks.predictions import Predictions
from lm_lightning.callbacks.preemption import Preemption
from lm_lightning.callbacks.progress import RunProgress
from lm_lightning.callbacks.resuming import Resuming
from lm_lightning.callbacks.spikes import Spikes
from lm_lightning.callbacks.throughput import Throughput
from lm_lightning.checkpoints.callback import Checkpoints
from lm_lightning.checkpoints.loading import find_checkpoint, folder_of, load_checkpoint, run_of
from lm_lightning.checkpoints.plugins import BackgroundCheckpoints, CheckpointFiles  # noqa: F401
from lm_lightning.cli import evaluation, explain, guide, saving, settings
from lm_lightning.console import printable
from lm_lightning.data.pretraining import PretrainingData  # noqa: F401
from lm_lightning.environment import environment
from lm_lightning.errors import UserError, of_instance
from lm_lightning.models.gpt import CausalLM  # noqa: F401
from lm_lightning.models.module import LanguageModule
from lm_lightning.security import imports, untrusted
from lm_lightning.security.redaction import REDACTED, find_redacted, redact

features.import_classes()  # here, not in a function, since Ctrl-C is handled differently once the command runs

CHECKPOINTS = {
    "dirpath": f"{runs.PLACEHOLDER}/checkpoints",
    "auto_insert_metric_name": False,
    "enable_version_counter": False,
}
TRAINER_DEFAULTS = {
    "default_root_dir": runs.PLACEHOLDER,
    "use_distributed_sampler": False,  # ours knows about ranks, and keeps the order
    "gradient_clip_val": 1.0,
    "enable_model_summary": False,  # the network is one line of it
    "logger": [
        {"class_path": "lm_lightning.callbacks.metrics_file.MetricsFile", "init_args": {"save_dir": runs.PLACEHOLDER}},
        {
            "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
            "init_args": {"save_dir": runs.PLACEHOLDER, "name": "", "version": "tensorboard"},
        },
    ],
}
TRAINER_HELP = {  # where we differ from Lightning, or it says too little
    "trainer.val_check_interval": "How often to validate: a float is a share of the epoch, an int a number of "
    "optimizer steps (Lightning: of micro-batches), which are counted from the start of each epoch, or, with "
    "--trainer.check_val_every_n_epoch null, over all epochs. The last step is always validated.",
    "trainer.limit_train_batches": "Micro-batches of an epoch, or its share of the data (a float). The next epoch "
    "continues with the samples that follow.",
    "trainer.overfit_batches": "Trains on the same first micro-batches (an int, or a float: a share) in each epoch, in "
    "the same order, and validates on as many batches of the validation split.",
}
EXPECTED_WARNINGS = (
    "Experiment logs directory",  # MetricsFile goes on with what is there
    "Checkpoint directory .* exists and is not empty",  # so it is on a resume
    "You're resuming from a checkpoint that ended before the epoch ended",  # the order goes on by itself
    "The '.*_dataloader' does not have many workers",  # blocks come from a memory map
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    "The dirpath has changed",  # an earlier state goes on in another folder
    "It is recommended to use `self.log",  # what is logged is the same on all ranks
    "Metric `SpearmanCorrcoef` will save all",  # as many numbers as there are rows
    "LightningCLI's args parameter is intended",  # by `compress`
    "The number of training batches .* is smaller than the logging interval",  # steps are logged across epochs
    "You are using a custom batch sampler",  # SequentialBatches leaves nothing out
)


class OptionParser(LightningArgumentParser):
    """The parser of the CLI: no abbreviated options, and loggers write into the run folder unless told otherwise."""

    def __init__(self, *args: Any, allow_abbrev: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=allow_abbrev, **kwargs)

    def parse_args(self, args: Any = None, *more: Any, **kwargs: Any) -> Any:  # noqa: D102
        if getattr(self, "_inner_parser", False) and args and len(args) == 1:  # an option of a class
            args = [as_yaml(args[0])]
        return super().parse_args(args, *more, **kwargs)

    def add_class_arguments(self, theclass: type, *args: Any, **kwargs: Any) -> list[str]:  # noqa: D102
        added = super().add_class_arguments(theclass, *args, **kwargs)
        if inspect.isclass(theclass) and issubclass(theclass, Logger) and "save_dir" in added:
            self.set_defaults(save_dir=runs.PLACEHOLDER)
        return added


class CLI(LightningCLI):
    """`python -m lm_lightning fit | validate | test | predict`.

    Args:
        args: Command line. Default: this process's.
        callbacks: More of them.
    """

    def __init__(self, args: Optional[list[str]] = None, callbacks: Sequence[Callback] = ()) -> None:
        hub.quiet()
        for library in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(library).setLevel(logging.WARNING)  # of what they report, we tell what matters
        for message in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        super().__init__(
            LanguageModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=RunFolder,
            trainer_defaults=TRAINER_DEFAULTS | {"callbacks": list(callbacks)},
            args=args,
            seed_everything_default=1,
            auto_configure_optimizers=False,
            parser_class=OptionParser,
            parser_kwargs={"prog": explain.program(), "exit_on_error": False, "formatter_class": guide.Help}
            | guide.of_commands(LanguageModule, LightningDataModule),
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--name", type=Optional[str], help="Name of the experiment. Default: that of the first config file."
        )
        parser.add_argument(
            "--runs_dir", type=str, default="runs", help="Folder of all runs: <runs_dir>/<name>/<time>."
        )
        parser.add_argument(
            "--export",
            type=Weights,
            default="best",
            help="Whose weights model/ gets when training has ended: those of the best checkpoint by best.monitor, or "
            "those of the last step.",
        )
        for action in parser._actions:
            action.help = TRAINER_HELP.get(action.dest, action.help)
        parser.add_lightning_class_args(Checkpoints, "best")
        parser.set_defaults({f"best.{k}": v for k, v in CHECKPOINTS.items()})
        parser.set_defaults({"best.filename": "best"})
        parser.add_lightning_class_args(Checkpoints, "last")
        parser.set_defaults({f"last.{k}": v for k, v in CHECKPOINTS.items()})
        parser.set_defaults({"last.filename": "last"})
        parser.add_lightning_class_args(Predictions, "predictions")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses config files first, in their order, and then all flags; of an evaluation of a run, its config first.

        `evaluated` is then the run folder.
        """
        self.evaluated: Optional[Path] = None
        self.arguments: list[str] = []
        if isinstance(args, (dict, Namespace)):  # settings that are given in Python
            return super().parse_arguments(parser, args)
        self.arguments = list(sys.argv[1:] if args is None else args)
        self.evaluated, arguments = evaluation.of_arguments(self.arguments)
        config = self.parse(parser, arguments, self.evaluated)
        if self.config.subcommand not in evaluation.COMMANDS or self.evaluated is not None:
            return
        self.evaluated = evaluation.of_config(config, name_of(config))
        if self.evaluated is None or evaluation.record_of(config.config):
            return
        own = self.parse(parser, evaluation.with_config_of(self.evaluated, self.arguments), self.evaluated)
        if different := [
            *evaluation.differences(config.model, own.model, "model"),
            *evaluation.differences(config.data, own.data, "data"),
        ]:
            given = ", ".join(config.config or [])
            names = printable(", ".join(sorted(different)))
            print(f"settings: those of {self.evaluated}/config.yaml, not of {given}: {names}")

    def parse(self, parser: LightningArgumentParser, arguments: list[str], run: Optional[Path]) -> Any:
        """Sets `config`, and returns that of the subcommand; `run` is the one whose config is among the arguments."""
        options, sources, flags = settings.layered(arguments[1:])
        if run is not None:
            own = run / "config.yaml"
            given = [Path(file).expanduser().read_text(encoding="utf-8") for file in sources if Path(file) != own]
            imports.restrict(own, [*flags, *given])
        try:
            self.config = parser.parse_args([*arguments[:1], *settings.as_argument(options), *flags])
            imports.check()
        except ValueError as error:  # not even a name of a file, which an option's value may be
            imports.check()
            raise UserError(f"an option's value cannot be read: {error}") from error
        except ArgumentError as error:
            imports.check()
            names = explain.flags_of(self._parser(arguments[0]))
            for section in ("model", "data"):
                names += explain.options_of(chosen_class(section, options, flags), section)
            raise explain.of_command_line(error, arguments, names) from error
        config = self.config[self.config.subcommand]
        settings.report_replaced(options, config)
        config.config = sources  # the first one names the run
        return config

    def _parse_ckpt_path(self) -> None:
        """Checks the settings; Lightning would put those of a checkpoint over the command line's here."""
        check(self.config[self.config.subcommand])

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        config.name = name = name_of(config)
        imports.check_folders(config.trainer, self.arguments)
        if config.best.monitor is None:
            model_class: Any = imports.locate(str(config.model.class_path))
            config.best.monitor = f"val/{model_class.main_metric(config.data.init_args)}"
        if config.trainer.logger is True:
            config.trainer.logger = self._parser(self.subcommand).get_defaults().trainer.logger
        loggers = as_list(config.trainer.logger)
        if self.subcommand != "fit":
            # Most loggers would continue the files of the training.
            loggers = [c for c in loggers if getattr(imports.locate(c.class_path), "logs_evaluations", False)]
        config.trainer.logger = loggers or False
        run, weights = self.evaluated, ""
        if self.subcommand != "fit":
            weights = self.evaluated_weights(config)
        elif config.ckpt_path is not None:
            folder = folder_of(config.ckpt_path, config.runs_dir, name)
            checkpoint, _ = find_checkpoint(config.ckpt_path, folder)
            # An earlier state than the last starts a run folder of its own, and so does another name or folder.
            same = config.ckpt_path == "last" or checkpoint.name == "last.ckpt"
            run = run_of(checkpoint) if same else None
            run = None if run is not None and self.elsewhere(run) else run
            if run is not None:
                untrusted.refuse_links(run)
                for folder in (run, run / "checkpoints"):
                    files.remove_stale(folder)
            config.ckpt_path = str(checkpoint.absolute())
        pretrained, options = config.model.init_args.get("pretrained"), config.data.init_args
        trains_none = "tables" in options or self.subcommand != "fit"
        if pretrained and trains_none and hasattr(options.get("tokenizer"), "path") and options.tokenizer.path is None:
            options.tokenizer.path = runs.pretrained_name(pretrained, "tokenizer")
        config.weights_only = True  # of what a checkpoint holds, nothing is run
        for complete in features.trainer_settings():
            complete(config.trainer)
        if config.trainer.precision is None:
            config.trainer.precision = best_precision(config.trainer.accelerator)
        if missing := sorted(set(find_redacted(config.as_dict()))):
            raise UserError(
                f"the config has {REDACTED} in the place of {', '.join(missing)}, as secrets are not saved: give "
                "these options again, as flags or in a second --config"
            )
        self.checkpoint = config.ckpt_path
        self.reusable_config = config.clone()  # with `<run>` in it, it can be run again
        if self.subcommand == "fit":
            self.reusable_config.ckpt_path = None
            self.reusable_config = saving.checked(self._parser("fit"), self.reusable_config)
            self.run_folder = run or runs.new_run(runs.experiment_folder(config.runs_dir, name))
        else:
            parent, logs = runs.experiment_folder(config.runs_dir, name), None
            if run is not None and not self.elsewhere(run):
                untrusted.refuse_links(run)
                parent, logs = run / "evaluations", run
            self.run_folder = runs.new_run(parent, f"-{self.subcommand}")
            config.trainer.logger = fill_in(config.trainer.logger, str(logs or self.run_folder))
        self.record = evaluation.Evaluation(self._parser(self.subcommand), self.reusable_config, run, weights)
        interval = config.trainer.val_check_interval
        if isinstance(interval, int) or (isinstance(interval, float) and interval > 1):
            # Steps everywhere, as trainer.max_steps; Lightning counts micro-batches here.
            config.trainer.val_check_interval = interval * config.trainer.accumulate_grad_batches
        self.config[self.subcommand] = fill_in(config, str(self.run_folder))

    def evaluated_weights(self, config: Any) -> str:
        """What an evaluation loads; sets the weights and the tokenizer where these are those of a run."""
        if self.evaluated is not None and not evaluation.record_of(config.config):
            weights = evaluation.configure(config, self.evaluated)
        elif config.ckpt_path is not None:
            weights = config.ckpt_path = str(Path(config.ckpt_path).expanduser().absolute())
        elif pretrained := config.model.init_args.get("pretrained"):
            weights = pretrained
        else:
            raise UserError(
                f"{self.subcommand} needs trained weights: give a run, as in `{self.subcommand} RUN`, "
                "--ckpt_path last or a checkpoint, or --model.pretrained"
            )
        if config.ckpt_path is not None:
            load_checkpoint(Path(config.ckpt_path), weights=False)
        return weights

    def elsewhere(self, run: Path) -> bool:
        """Whether the command line asks for another name or folder than those of a run."""
        config = self.config[self.subcommand]
        given = {argument.partition("=")[0] for argument in self.arguments}
        return ("--name" in given and config.name != run.parent.name) or (
            "--runs_dir" in given and Path(config.runs_dir).expanduser().resolve() != run.parent.parent.resolve()
        )

    def after_instantiate_classes(self) -> None:
        trainer = self.trainer
        self.model.evaluated_checkpoint = None if self.subcommand == "fit" else self.checkpoint
        if trainer.is_global_zero:
            print(f"{'run' if self.subcommand == 'fit' else 'evaluation'} folder: {self.run_folder}")
            print(f"device: {trainer.strategy.root_device} x {trainer.world_size}, precision: {trainer.precision}")
            if self.subcommand != "fit":
                print(f"weights: {printable(self.record.weights())}")
            elif self.checkpoint:
                print(f"checkpoint: {self.checkpoint}")

    def instantiate_classes(self) -> None:
        """What classes do not accept is the user's to mend."""
        try:
            super().instantiate_classes()
            imports.check()
        except (ValueError, TypeError, ImportError, RuntimeError, MisconfigurationException) as error:
            imports.check()
            cause: Optional[BaseException] = error  # jsonargparse wraps what is raised
            while cause is not None and not isinstance(cause, UserError):
                cause = cause.__cause__ or cause.__context__
            raise cause or of_instance(error) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        self.config[self.subcommand] = self.reusable_config  # for RunFolder; the classes are made already
        config = self.config_init[self.subcommand].trainer
        callbacks, plugins = as_list(config.callbacks), as_list(config.plugins)
        check_after_validation(callbacks)
        extra = [Monitors(), Resuming(), Ending(), Preemption(), Throughput(), *features.callbacks()]
        if self.subcommand != "fit":
            extra.append(self.record)
        if config.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            extra.append(RunProgress())
        if not any(isinstance(c, Spikes) for c in callbacks):
            extra.append(Spikes())
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins = [*plugins, CheckpointFiles()]
        trainer = super().instantiate_trainer(
            callbacks=[*callbacks, *extra],
            plugins=plugins,
            enable_checkpointing=config.enable_checkpointing or None,
            **kwargs,
        )
        if config.enable_checkpointing is False:  # which Lightning refuses beside the checkpoints of this CLI
            trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, Checkpoints)]
        else:  # when the checkpoints of the last step are there
            trainer.callbacks.append(Export(self.config_init[self.subcommand].export))
        for name in ("best", "last"):
            self.config_init[self.subcommand][name].option = name
        FitLoop.replace(trainer)
        strategies.check(trainer.strategy)
        return trainer


class RunFolder(SaveConfigCallback):
    """Writes into the run folder what the run is made of: config, environment, tokenizer, data."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lightning would write here, before a checkpoint has had its say."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # nothing is left to refuse
        if not trainer.is_global_zero:
            return
        run = Path(trainer.default_root_dir)
        config = run / "config.yaml"
        if config.exists():  # resumed: the old one stays under another name, too
            free = next(p for n in range(1, 10**6) if not os.path.lexists(p := run / f"config.{n}.yaml"))
            files.write_text(free, config.read_text(encoding="utf-8"))
        saving.write(self.parser, self.config, config)
        for logger in trainer.loggers:
            if not isinstance(logger, (CSVLogger, TensorBoardLogger)):  # whose files lie beside it
                logger.log_hyperparams(settings.load(config.read_text(encoding="utf-8")))
        files.write_text(run / "environment.json", json.dumps(environment(), indent=2))
        files.write_text(run / "data.json", json.dumps(redact(trainer.datamodule.info), indent=2))
        with files.replacing_folder(run / "tokenizer") as folder:
            trainer.datamodule.tokenizer.save_pretrained(folder)


def name_of(config: Any) -> str:
    """The name of the experiment, which is that of the first config file by default."""
    return config.name or (Path(config.config[0]).stem if config.config else "run")


def chosen_class(section: str, options: dict[str, Any], flags: list[str]) -> Any:
    """The class of the model or the data, as far as config files and flags say it, else the base of all."""
    given = options.get(section)
    name = given.get("class_path") if isinstance(given, dict) else None
    for flag, value in zip(flags, [*flags[1:], ""]):
        own, _, rest = flag.partition("=")
        if own in (f"--{section}", f"--{section}.class_path"):
            name = rest or value
    base = LanguageModule if section == "model" else LightningDataModule
    return explain.subclasses(base).get(str(name).rpartition(".")[2], base)


def check(config: Any) -> None:
    """Refuses settings of the trainer that Lightning takes, or fails at, without a word."""
    targets = {
        "trainer": Trainer,
        "best": Checkpoints,
        "last": Checkpoints,
        "predictions": Predictions,
        "model": None,
        "data": None,
    }
    for name, target in targets.items():
        if not hasattr(config[name], "items"):
            raise UserError(f"{name} is {config[name]!r}, but must have options by name")
        refuse_null(config[name], name, target)
    if imports.locate(str(config.data.get("class_path"))) in (None, LightningDataModule):
        raise UserError("data has no class_path: give one, such as PretrainingData")
    trainer = config.trainer
    check_location(config)
    strategies.check_name(trainer.strategy)
    for name, value, least in (
        ("trainer.accumulate_grad_batches", trainer.accumulate_grad_batches, 1),
        ("trainer.gradient_clip_val", trainer.gradient_clip_val, 0),
        ("trainer.log_every_n_steps", trainer.log_every_n_steps, 1),
        ("seed_everything", config.seed_everything, 0),
    ):
        if value is not None and value < least:
            raise UserError(f"{name} is {value}, but must be {least} or more")
    if trainer.max_steps == 0 or trainer.max_steps < -1:
        raise UserError(f"trainer.max_steps is {trainer.max_steps}, but must be 1 or more, or -1 for no limit")
    if trainer.max_epochs is not None and (trainer.max_epochs == 0 or trainer.max_epochs < -1):
        raise UserError(f"trainer.max_epochs is {trainer.max_epochs}, but must be 1 or more, or -1 for no limit")
    if trainer.check_val_every_n_epoch is not None and trainer.check_val_every_n_epoch < 1:
        raise UserError(
            f"trainer.check_val_every_n_epoch is {trainer.check_val_every_n_epoch}, but must be 1 or more, or null to "
            "count trainer.val_check_interval over all epochs; --trainer.limit_val_batches 0 trains without validation"
        )
    if trainer.limit_train_batches == 0:
        raise UserError("trainer.limit_train_batches is 0, but must be 1 or more, or a share of the data (0.1)")
    if trainer.val_check_interval == 0:
        raise UserError("trainer.val_check_interval is 0, but must be 1 or more steps, or a share of the epoch (0.5)")
    check_slurm()


def check_slurm() -> None:
    """Refuses to start in an allocation of SLURM's, but without srun, where Lightning misses variables."""
    if "TORCHELASTIC_RUN_ID" in os.environ or not SLURMEnvironment.detect():
        return
    if missing := [name for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID") if name not in os.environ]:
        raise UserError(
            f"SLURM_NTASKS is set, so SLURM should have started this process, but {missing[0]} is not: start it with "
            "srun, or to run without SLURM, with `env -u SLURM_NTASKS python -m lm_lightning ...`"
        )


def check_location(config: Any) -> None:
    """Refuses options that would put a part of a run somewhere else than into its run folder."""
    loggers = as_list(config.trainer.logger)
    own_files = [own for own in loggers if str(getattr(own, "class_path", "")).endswith("MetricsFile")]
    for name, value, default in [
        ("trainer.default_root_dir", config.trainer.default_root_dir, TRAINER_DEFAULTS["default_root_dir"]),
        ("best.dirpath", config.best.dirpath, CHECKPOINTS["dirpath"]),
        ("last.dirpath", config.last.dirpath, CHECKPOINTS["dirpath"]),
        *(("save_dir of MetricsFile", logger.init_args.save_dir, runs.PLACEHOLDER) for logger in own_files),
    ]:
        if str(value) != default:
            raise UserError(
                f"{name} is {value}, but a run has all its files in one folder, <runs_dir>/<name>/<time>: remove it, "
                "and say where runs are with --runs_dir"
            )


def refuse_null(value: Any, name: str, target: Any) -> None:
    """Refuses options that are null although what takes them says that they must not be, which the parser lets pass.

    Args:
        value: Options by name, with those within them.
        name: Where they stand, for messages.
        target: The class that takes them, None if they name it.
    """
    if "class_path" in value:
        target, value = imports.locate(value["class_path"]), value.get("init_args") or {}
    hints: dict[str, Any] = {}
    for base in reversed(inspect.getmro(target)) if inspect.isclass(target) else ():  # `**options` are those of a base
        with contextlib.suppress(NameError):  # of types that are imported for type checkers only
            hints |= typing.get_type_hints(base.__init__)  # type: ignore[misc]
    for key, option in (value if isinstance(value, dict) else vars(value)).items():
        hint = hints.get(key)
        if option is None and hint not in (None, Any) and type(None) not in typing.get_args(hint):
            raise UserError(f"{name}.{key} is null, but must have a value: leave it out for its default")
        if hasattr(option, "items"):  # null within a network's settings is theirs to judge
            refuse_null(option, f"{name}.{key}", hint if dataclasses.is_dataclass(hint) else None)


def as_yaml(argument: str) -> str:
    """A flag whose value jsonargparse has read and written as Python does, such as `--path=None`, as YAML again."""
    name, _, value = argument.partition("=")
    if value == "None" or value[:1] in ("[", "{"):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError):
            return f"{name}={json.dumps(ast.literal_eval(value))}"
    return argument


def as_list(value: Any) -> list:
    """What Lightning accepts as one item, a list of them, null or false."""
    return list(value) if isinstance(value, (list, tuple)) else [value] if value else []


def fill_in(config: Any, run: str) -> Any:
    """Puts the run folder where the options say `<run>`."""
    if isinstance(config, str):
        return config.replace(runs.PLACEHOLDER, run)
    if isinstance(config, list):
        return [fill_in(value, run) for value in config]
    if isinstance(config, dict):
        return {key: fill_in(value, run) for key, value in config.items()}
    if hasattr(config, "items"):  # jsonargparse's Namespace
        for key, value in config.items(branches=False):
            config[key] = fill_in(value, run)
    return config


def best_precision(accelerator: Any) -> str:
    """bf16 with float32 weights where the machine computes it natively, else float32."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        native = False  # autocast to bf16 needs a recent macOS: ask for it with --trainer.precision bf16-mixed
    else:
        checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
        native = any(check() for check in checks if check is not None)
    return "bf16-mixed" if native else "32-true"


def main() -> None:
    """Parses the command line and runs the subcommand."""
    with runs.removed_if_refused():
        try:
            CLI()
        except MisconfigurationException as error:
            raise UserError(" ".join(str(error).split())) from error
        except (ValueError, TypeError, RuntimeError) as error:
            if not refused_by_lightning(error):
                raise
            raise UserError(f"Lightning refuses these settings: {' '.join(str(error).split())}") from error


def refused_by_lightning(error: BaseException) -> bool:
    """Whether an error is one that Lightning raises itself where it checks settings, and not a bug anywhere."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    file = frame.f_code.co_filename
    inside = Path(file).is_relative_to(Path(lightning.__file__).parent)
    return inside and linecache.getline(file, line).strip().startswith("raise ")
