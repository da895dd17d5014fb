"""Lightning: loops, trainers and callbacks."""

import logging
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loops.evaluation_loop import RestartStage
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric


class Override(NamedTuple):
    """A private method of Lightning that one of our classes overrides."""

    base: str
    method: str
    ours: str
    reason: str


OVERRIDES = (
    Override(
        "lightning.pytorch.callbacks.ModelCheckpoint",
        "_should_save_on_train_epoch_end",
        "lm_lightning.checkpoints.callback.Checkpoints",
        "Lightning would save at the end of an epoch before its validation. save_on_train_epoch_end=False is not an "
        "alternative, as runs without validation would then save nothing.",
    ),
    Override(
        "lightning.pytorch.callbacks.ModelCheckpoint",
        "_monitor_candidates",
        "lm_lightning.checkpoints.callback.Checkpoints",
        "Lightning keeps the metrics of a validation, and would assign them to later steps without a validation. "
        "trainer.callback_metrics cannot be cleared between steps, as loggers and EarlyStopping read it.",
    ),
    Override(
        "lightning.pytorch.callbacks.ModelCheckpoint",
        "_save_topk_checkpoint",
        "lm_lightning.checkpoints.callback.Checkpoints",
        "Lightning fails if an epoch or the run ends at a step without a validation. There is no public hook for this.",
    ),
    Override(
        "lightning.pytorch.loggers.csv_logs.ExperimentWriter",
        "_check_log_dir_exists",
        "lm_lightning.callbacks.metrics_file.Rows",
        "Lightning removes metrics.csv before the checkpoint of a resumed run is checked. A logger without "
        "ExperimentWriter would have to duplicate it.",
    ),
    Override(
        "lightning.pytorch.loggers.csv_logs.ExperimentWriter",
        "_rewrite_with_new_header",
        "lm_lightning.callbacks.metrics_file.Rows",
        "Lightning overwrites the file in place, so it would be lost if the process is killed.",
    ),
    Override(
        "lightning.pytorch.cli.LightningCLI",
        "_parse_ckpt_path",
        "lm_lightning.cli.app.CLI",
        "Lightning replaces settings of the command line by hyperparameters of the checkpoint, and fails if no class "
        "has them. This project does not call save_hyperparameters, but a foreign checkpoint may contain some.",
    ),
)

# Regular expressions for the start of warnings that a run would print although nothing is wrong, and the reasons.
# Lightning has no categories or switches for single warnings.
EXPECTED_WARNINGS = {
    "Experiment logs directory": "MetricsFile continues the file",
    "Checkpoint directory .* exists and is not empty": "expected when a run is resumed",
    "You're resuming from a checkpoint that ended before the epoch ended": "the sampler restores its position",
    "The '.*' does not have many workers": "blocks are read from a memory map",
    "The dirpath has changed": "a run that starts from an earlier checkpoint has its own folder",
    "It is recommended to use `self.log": "the logged values are equal on all ranks",
    "LightningCLI's args parameter is intended": "commands that evaluate several models use it",
    "The number of training batches .* is smaller than the logging interval": "steps are logged across epochs",
    "You are using a custom batch sampler": "SequentialBatches omits no sample",
}
# The same for warnings of torch and torchmetrics that Lightning and our metrics cause
EXPECTED_WARNINGS_OF_OTHERS = {
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated": "Lightning uses it",
    "Metric `SpearmanCorrcoef` will save all": "the correlation needs all values",
}


def hide_expected_warnings() -> None:
    """Hides warnings that are irrelevant to our runs, and Lightning's messages about its choices.

    Alternative: none. `Trainer(enable_model_summary=False)` hides only one of the messages.
    """
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    for message in (*EXPECTED_WARNINGS, *EXPECTED_WARNINGS_OF_OTHERS):
        warnings.filterwarnings("ignore", message=message)


def move_metrics_once() -> None:
    """Makes `log` not search a metric for tensors to move if it is on the device of the logged value already.

    This takes 4 % of a step of 60 ms. Alternative: logging only every few steps, but callbacks may read the metrics of
    each step.
    """
    move = _ResultMetric.to
    if move.__name__ == "move_once":
        return

    def move_once(self: _ResultMetric, *device: Any, **settings: Any) -> _ResultMetric:
        if self.is_tensor and not settings and device == (self.value.device,):
            return self
        return move(self, *device, **settings)

    _ResultMetric.to = move_once  # type: ignore[method-assign]


LightningFitLoop = _FitLoop
"""The loop over the epochs, for subclasses.

The base class is private since Lightning 2.0. Alternative: none. Callbacks cannot start a validation, and
`trainer.fit_loop` accepts only instances of it.
"""


def subcommand_parser(cli: LightningCLI, name: str) -> LightningArgumentParser:
    """The parser of a subcommand, which is needed to dump its config and to get its defaults.

    Alternative: `cli.parser` is the parser of all subcommands; jsonargparse does not publish those of each, either.
    """
    return cli._parser(name)


def cluster_environment(trainer: Trainer) -> ClusterEnvironment:
    """The environment in which the processes were started, such as SLURM.

    Alternative: `trainer.strategy.cluster_environment`, which strategies for a single device do not have.
    """
    return trainer._accelerator_connector.cluster_environment


def disable_signal_broadcast(trainer: Trainer) -> None:
    """Stops Lightning from checking at each batch whether a process received SIGTERM.

    The check makes all processes wait for their devices. Alternative: none, there is no switch. The Preemption callback
    checks on the CPU instead.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def validation_is_due(trainer: Trainer) -> bool:
    """Whether Lightning validates after the latest batch.

    Alternative: computing it from `val_check_interval` and other options, which would duplicate 30 lines.
    """
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None  # there is one when training has started
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def restart_workers(trainer: Trainer) -> None:
    """Starts the workers of the training dataloader again at the start of a pass, as they keep a copy of the dataset.

    Lightning starts them before its hooks. Alternative: none, the fetcher of the loop is private.
    """
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is not None:
        iter(fetcher)


def repeat_validation(trainer: Trainer) -> None:
    """Makes a resumed run start with the validation that was not finished when its checkpoint was saved.

    Lightning would assume that it was finished. Alternative: none, the loop's state is not public.
    """
    validation = trainer.fit_loop.epoch_loop.val_loop
    validation.batch_progress.reset_on_run()
    validation._restart_stage = RestartStage.RESTARTED_MID_EVALUATION


def mark_epoch_validated(trainer: Trainer) -> None:
    """Makes a resumed run whose epoch is complete start the next one; Lightning would train one more batch.

    Alternative: none, the loop's state is not public.
    """
    trainer.fit_loop.epoch_loop.val_loop._has_run = True


def set_logged_steps(trainer: Trainer, steps: int) -> None:
    """Sets the number of optimizer steps by which `trainer.log_every_n_steps` is counted.

    Lightning counts the last step twice when it resumes. Alternative: none, the counter is not public.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = steps


def check_after_validation(callback: EarlyStopping) -> None:
    """Makes an EarlyStopping check its metric after validations, unless the user has chosen the end of epochs.

    By default, Lightning checks at the end of an epoch, where the metric may be missing or outdated. Alternative: to
    pass `check_on_train_epoch_end`, but only this attribute shows whether the user has passed it.
    """
    if callback._check_on_train_epoch_end is None:
        callback._check_on_train_epoch_end = False


def saves_by_default(callback: Any) -> bool:
    """Whether a ModelCheckpoint was made without `save_on_train_epoch_end`.

    Alternative: none, the argument is kept in a private attribute.
    """
    return callback._save_on_train_epoch_end is None


def writer_of(logger: CSVLogger, make: Callable[[], ExperimentWriter]) -> ExperimentWriter:
    """The writer of a CSVLogger, which is created when it is first needed.

    The logger closes the writer in its private attribute. Alternative: none, the logger always creates its own class.
    """
    if logger._experiment is None:
        logger._experiment = make()
    return logger._experiment
