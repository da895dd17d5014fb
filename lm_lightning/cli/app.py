"""`fit`, `validate`, `test` and `predict`: a LightningCLI that runs in a run folder."""

import linecache
import sys
import traceback
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import lightning
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lm_lightning import features, files, strategies
from lm_lightning import run as runs
from lm_lightning.callbacks.corpora import Corpora
from lm_lightning.callbacks.ending import Ending, check_after_validation
from lm_lightning.callbacks.export import Export
from lm_lightning.callbacks.fit_loop import FitLoop
from lm_lightning.callbacks.monitors import Monitors
from lm_lightning.callbacks.preemption import Preemption
from lm_lightning.callbacks.progress import RunProgress
from lm_lightning.callbacks.resuming import Resuming
from lm_lightning.callbacks.throughput import Throughput
from lm_lightning.checkpoints.callback import Checkpoints
from lm_lightning.checkpoints.loading import checkpoint_folder, find_checkpoint, run_of
from lm_lightning.checkpoints.plugins import CheckpointFiles
from lm_lightning.cli import checks, defaults, evaluation, explain, guide, saving, settings
from lm_lightning.cli.defaults import as_list
from lm_lightning.cli.options import HELP, SECTIONS, TRAINER_DEFAULTS, OptionParser, add_options
from lm_lightning.cli.run_folder import RunFolder
from lm_lightning.compat.jsonargparse import set_help
from lm_lightning.compat.lightning import hide_expected_warnings, move_metrics_once, subcommand_parser
from lm_lightning.compat.transformers import hide_load_report
from lm_lightning.console import printable
from lm_lightning.errors import UserError, one_line
from lm_lightning.models.module import LanguageModule
from lm_lightning.security import imports, untrusted
from lm_lightning.security.redaction import REDACTED, find_redacted

features.import_classes()  # not in a function, as Ctrl-C is handled differently once the command runs


class CLI(LightningCLI):
    """`python -m lm_lightning fit | validate | test | predict`.

    Args:
        args: Subcommand and arguments. Default: those of the command line.
        callbacks: Callbacks to add to those of the options.
    """

    def __init__(self, args: Optional[list[str]] = None, callbacks: Sequence[Callback] = ()) -> None:
        hide_load_report()
        hide_expected_warnings()
        move_metrics_once()
        self.command = next(iter(sys.argv[1:] if args is None else args if isinstance(args, list) else []), None)
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
            | guide.command_texts(self.subcommands(), LanguageModule, LightningDataModule),
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the subcommand that is run, if it is known: a parser has hundreds of options and is slow to build."""
        every = super().subcommands()
        return {name: every[name] for name in every if self.command is None or name == self.command} or every

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        add_options(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the config files in order, then all flags. When a run is evaluated, its config comes first.

        Sets `evaluated` to the folder of that run.
        """
        self.evaluated: Optional[Path] = None
        self.arguments: list[str] = []
        if isinstance(args, (dict, Namespace)):  # settings that are given in Python
            return super().parse_arguments(parser, args)
        self.arguments = list(sys.argv[1:] if args is None else args)
        for name in self.subcommands():
            set_help(subcommand_parser(self, name), HELP, SECTIONS)  # here, as Lightning adds options after ours
        self.evaluated, arguments = evaluation.replace_run_argument(self.arguments)
        config = self.parse(parser, arguments, self.evaluated)
        if self.config.subcommand not in evaluation.COMMANDS or self.evaluated is not None:
            return
        self.evaluated = evaluation.find_evaluated_run(config, defaults.experiment_name(config))
        if self.evaluated is None or evaluation.record_of(config.config):
            return
        own = self.parse(parser, evaluation.use_config_of(self.evaluated, self.arguments), self.evaluated)
        if different := [
            *evaluation.differences(config.model, own.model, "model"),
            *evaluation.differences(config.data, own.data, "data"),
        ]:
            given = ", ".join(config.config or [])
            names = printable(", ".join(sorted(different)))
            print(f"settings: from {self.evaluated}/config.yaml, which differs from {given} in: {names}")

    def parse(self, parser: LightningArgumentParser, arguments: list[str], run: Optional[Path]) -> Any:
        """Sets `config` and returns the options of the subcommand.

        Args:
            parser: The parser of all subcommands.
            arguments: Subcommand and arguments.
            run: The run whose config is among the arguments, if any.

        Raises:
            UserError: If the parser refuses them.
        """
        options, sources, flags = settings.read_layered(arguments[1:])
        if run is not None:
            own = run / "config.yaml"
            given = [Path(file).expanduser().read_text(encoding="utf-8") for file in sources if Path(file) != own]
            imports.restrict(own, [*flags, *given])
        try:
            self.config = parser.parse_args([*arguments[:1], *settings.to_argument(options), *flags])
            imports.check()
        except ValueError as error:  # a value that cannot even be the name of a file
            imports.check()
            raise UserError(f"an option's value cannot be read: {error}") from error
        except ArgumentError as error:
            imports.check()
            names = explain.flags_of(subcommand_parser(self, arguments[0]))
            for section in ("model", "data"):
                names += explain.options_of(chosen_class(section, options, flags), section)
            raise explain.command_line_error(error, arguments, names) from error
        config = self.config[self.config.subcommand]
        settings.print_replaced(options, config)
        config.config = sources  # the run is named after the first one
        return config

    def _parse_ckpt_path(self) -> None:
        """Checks the settings. Lightning would override them by those of the checkpoint here."""
        checks.check(self.config[self.config.subcommand])

    def before_instantiate_classes(self) -> None:
        """Completes the settings and creates the run folder."""
        config = self.config[self.subcommand]
        config.name = defaults.experiment_name(config)
        imports.check_folders(config.trainer, self.arguments)
        run, weights = self.evaluated, evaluation.Weights("")
        if self.subcommand == "fit":
            run = self.resumed_run(config)
        else:
            weights = evaluation.choose_weights(config, run, self.subcommand)
        self.evaluated_network = weights.network
        defaults.complete(config, self.subcommand, subcommand_parser(self, self.subcommand).get_defaults())
        if missing := sorted(set(find_redacted(config.as_dict()))):
            raise UserError(
                f"the config has {REDACTED} as the value of {', '.join(missing)}, as secrets are not saved: give "
                "these options again, as flags or in a second --config"
            )
        self.checkpoint = config.ckpt_path
        self.reusable_config = config.clone()  # with `<run>` not yet replaced, so that it can be run again
        if self.subcommand == "fit":
            self.reusable_config.ckpt_path = None
            self.reusable_config = saving.checked(subcommand_parser(self, "fit"), self.reusable_config)
            self.run_folder = run or runs.new_run(runs.experiment_folder(config.runs_dir, config.name))
        else:
            self.run_folder = self.evaluation_folder(config, run)
        self.record = evaluation.Evaluation(
            subcommand_parser(self, self.subcommand), self.reusable_config, run, weights.name
        )
        defaults.count_micro_batches(config.trainer)
        self.config[self.subcommand] = defaults.fill_in(config, str(self.run_folder))

    def resumed_run(self, config: Any) -> Optional[Path]:
        """The run that is resumed in its own folder, if any; sets `ckpt_path` to the path of its checkpoint.

        A checkpoint other than the newest, a different `--name` or a different `--runs_dir` starts a new run folder.
        """
        if config.ckpt_path is None:
            return None
        checkpoint, _ = find_checkpoint(
            config.ckpt_path, checkpoint_folder(config.ckpt_path, config.runs_dir, config.name)
        )
        same = config.ckpt_path == "last" or checkpoint.name == "last.ckpt"
        config.ckpt_path = str(checkpoint.absolute())
        run = run_of(checkpoint) if same else None
        if run is None or self.elsewhere(run):
            return None
        untrusted.refuse_links(run)
        for folder in (run, run / "checkpoints"):
            files.remove_stale(folder)
        return run

    def evaluation_folder(self, config: Any, run: Optional[Path]) -> Path:
        """A new folder for an evaluation, inside the run folder if a run is evaluated."""
        parent, logs = runs.experiment_folder(config.runs_dir, config.name), None
        if run is not None and not self.elsewhere(run):
            untrusted.refuse_links(run)
            parent, logs = run / "evaluations", run
        folder = runs.new_run(parent, f"-{self.subcommand}")
        config.trainer.logger = defaults.fill_in(config.trainer.logger, str(logs or folder))
        return folder

    def elsewhere(self, run: Path) -> bool:
        """Whether `--name` or `--runs_dir` of the command line differ from those of a run."""
        config = self.config[self.subcommand]
        given = {argument.partition("=")[0] for argument in self.arguments}
        return ("--name" in given and config.name != run.parent.name) or (
            "--runs_dir" in given and Path(config.runs_dir).expanduser().resolve() != run.parent.parent.resolve()
        )

    def after_instantiate_classes(self) -> None:
        trainer = self.trainer
        self.model.evaluated_network = self.evaluated_network
        if trainer.is_global_zero:
            print(f"{'run' if self.subcommand == 'fit' else 'evaluation'} folder: {self.run_folder}")
            print(f"device: {trainer.strategy.root_device} x {trainer.world_size}, precision: {trainer.precision}")
            if self.subcommand != "fit":
                print(f"weights: {printable(self.record.weights())}")
            elif self.checkpoint:
                print(f"checkpoint: {self.checkpoint}")

    def instantiate_classes(self) -> None:
        """Turns errors of classes that do not accept their options into a `UserError`."""
        try:
            super().instantiate_classes()
            imports.check()
        except (ValueError, TypeError, ImportError, RuntimeError, MisconfigurationException) as error:
            imports.check()
            cause: Optional[BaseException] = error  # jsonargparse wraps the original error
            while cause is not None and not isinstance(cause, UserError):
                cause = cause.__cause__ or cause.__context__
            raise cause or explain.instantiation_error(error) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        self.config[self.subcommand] = self.reusable_config  # for RunFolder; the classes are made already
        config = self.config_init[self.subcommand].trainer
        callbacks, plugins = as_list(config.callbacks), as_list(config.plugins)
        check_after_validation(callbacks)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins = [*plugins, CheckpointFiles()]
        trainer = super().instantiate_trainer(
            callbacks=[*callbacks, *self.default_callbacks(callbacks, config.enable_progress_bar)],
            plugins=plugins,
            enable_checkpointing=config.enable_checkpointing or None,
            **kwargs,
        )
        if config.enable_checkpointing is False:  # Lightning itself refuses that because of the callbacks of this CLI
            trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, Checkpoints)]
        else:  # comes last, as it needs the checkpoints of the last step
            trainer.callbacks.append(Export(self.config_init[self.subcommand].export))
        for name in ("best", "last"):
            self.config_init[self.subcommand][name].option = name
        FitLoop.replace(trainer)
        strategies.check(trainer.strategy)
        return trainer

    def default_callbacks(self, given: list[Callback], progress_bar: Optional[bool]) -> list[Callback]:
        """The callbacks that every run has in addition to those of the options.

        Args:
            given: The callbacks of the options.
            progress_bar: False for no progress bar. Otherwise a default one is added, unless `given` contains one.
        """
        own = [Monitors(), Resuming(), Ending(), Preemption(), Throughput(), Corpora(), *features.callbacks(given)]
        if self.subcommand != "fit":
            own.append(self.record)
        if progress_bar is not False and not any(isinstance(callback, ProgressBar) for callback in given):
            own.append(RunProgress())
        return own


def chosen_class(section: str, options: dict[str, Any], flags: list[str]) -> Any:
    """The class of the model or the data that config files and flags choose, else the base class."""
    given = options.get(section)
    name = given.get("class_path") if isinstance(given, dict) else None
    for flag, value in zip(flags, [*flags[1:], ""]):
        own, _, rest = flag.partition("=")
        if own in (f"--{section}", f"--{section}.class_path"):
            name = rest or value
    base = LanguageModule if section == "model" else LightningDataModule
    return explain.subclasses(base).get(str(name).rpartition(".")[2], base)


def main() -> None:
    """Parses the command line and runs the subcommand."""
    with runs.removed_if_refused():
        try:
            CLI()
        except MisconfigurationException as error:
            raise UserError(one_line(error, 1000)) from error
        except (ValueError, TypeError, RuntimeError) as error:
            if not refused_by_lightning(error):
                raise
            raise UserError(f"Lightning refuses these settings: {one_line(error, 1000)}") from error


def refused_by_lightning(error: BaseException) -> bool:
    """Whether Lightning itself raised an error, as where it checks settings; otherwise it is a bug somewhere else."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    file = frame.f_code.co_filename
    inside = Path(file).is_relative_to(Path(lightning.__file__).parent)
    return inside and linecache.getline(file, line).strip().startswith("raise ")
