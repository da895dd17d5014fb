"""The options of `fit`, `validate`, `test` and `predict`, except those of the chosen classes."""

import ast
import contextlib
import inspect
import json
import sys
from typing import Any, Optional

from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger

from lm_lightning import run as runs
from lm_lightning.callbacks.export import Weights
from lm_lightning.callbacks.predictions import Predictions
from lm_lightning.checkpoints.callback import Checkpoints
from lm_lightning.cli import explain
from lm_lightning.compat.jsonargparse import parses_class_options

CHECKPOINTS = {
    "dirpath": f"{runs.PLACEHOLDER}/checkpoints",
    "auto_insert_metric_name": False,
    "enable_version_counter": False,
}
TRAINER_DEFAULTS = {
    "default_root_dir": runs.PLACEHOLDER,
    "use_distributed_sampler": False,  # our samplers distribute samples over processes and keep their order
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 20,
    "enable_model_summary": False,  # it would describe the network in one line
    "logger": [
        {"class_path": "lm_lightning.callbacks.metrics_file.MetricsFile", "init_args": {"save_dir": runs.PLACEHOLDER}},
        {
            "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
            "init_args": {"save_dir": runs.PLACEHOLDER, "name": "", "version": "tensorboard"},
        },
    ],
}
HELP = {  # where this project differs from Lightning, or Lightning's help is too short
    "config": "Config file in YAML. May be repeated: files are merged, and later ones override earlier ones.",
    "print_config": "Print all settings in YAML and exit.",
    "seed_everything": "Seed of new weights, dropout and the order of samples; `true` chooses one at random.",
    "ckpt_path": "Checkpoint from which `fit` resumes, or which the other commands evaluate: `last`, the newest "
    "checkpoint of the newest run of this name; `best`, the best one (not for `fit`); or the path of a checkpoint or a "
    "run folder.",
    "weights_only": "Has no effect: checkpoints are always loaded as tensors and plain values.",
    "trainer.default_root_dir": "Cannot be changed: it is the run folder, see --runs_dir and --name.",
    "trainer.precision": "Precision of the computation, such as `32-true`, `bf16-mixed` or `16-mixed`. Default: "
    "`bf16-mixed` on devices that compute bf16 natively, otherwise `32-true`.",
    "trainer.strategy": "How the processes share the work, such as `ddp` or the class path of a strategy; see "
    "docs/devices.md.",
    "trainer.logger": "Loggers. Default: metrics.csv and TensorBoard in the run folder. `--trainer.logger+=NAME` adds "
    "one, `false` disables all.",
    "trainer.gradient_clip_val": "Maximum norm of the gradient; a larger gradient is scaled down to it. 0 or null "
    "disables this.",
    "trainer.enable_checkpointing": "Whether to write checkpoints and, at the end, model/. Default: true.",
    "trainer.enable_progress_bar": "Whether to show the progress. Default: true.",
    "trainer.enable_model_summary": "Whether to print Lightning's table of the network's layers.",
    "trainer.log_every_n_steps": "Number of optimizer steps between two rows of the training metrics.",
    "trainer.accumulate_grad_batches": "Number of micro-batches whose gradients are added up for one optimizer step.",
    "trainer.limit_val_batches": "Number of validation batches of each process (int), or fraction of the validation "
    "split (float). Default: all.",
    "trainer.limit_test_batches": "Number of test batches of each process (int), or fraction of the test split "
    "(float). Default: all.",
    "trainer.limit_predict_batches": "Number of batches for which each process computes predictions (int), or fraction "
    "of the data (float). Default: all.",
    "trainer.callbacks": "Callbacks to add, such as `--trainer.callbacks+=EarlyStopping "
    "--trainer.callbacks.monitor=val/loss`.",
    "best.dirpath": "Cannot be changed: checkpoints are written to `checkpoints/` of the run folder.",
    "last.dirpath": "Cannot be changed: checkpoints are written to `checkpoints/` of the run folder.",
    "trainer.val_check_interval": "Interval between validations: a number of optimizer steps (int; Lightning counts "
    "micro-batches), or a fraction of the epoch (float). It is counted from the start of each epoch or, with "
    "--trainer.check_val_every_n_epoch null, over all epochs. There is always a validation at the last step.",
    "trainer.limit_train_batches": "Number of micro-batches per epoch (int), or fraction of the data (float). The next "
    "epoch continues with the next samples.",
    "trainer.overfit_batches": "Number of micro-batches (int), or fraction of the data (float), on which every epoch "
    "trains, in the same order. Validation uses the same number of batches of the validation split.",
}

SECTIONS = {  # titles of the options in the help, instead of the first line of a docstring
    "trainer": "Lightning's Trainer",
    "model": "Model",
    "data": "Data",
    "best": "Checkpoint with the best validation metric, in checkpoints/best.ckpt",
    "last": "Newest checkpoint, from which a run is resumed, in checkpoints/last.ckpt",
    "predictions": "Files that `predict` and evaluations write",
    **dict.fromkeys(("fit", "validate", "test", "predict"), "Checkpoint to load"),
}


class OptionParser(LightningArgumentParser):
    """The parser of the CLI: no abbreviated options, and loggers write into the run folder by default."""

    def __init__(self, *args: Any, allow_abbrev: bool = False, **kwargs: Any) -> None:
        kwargs.setdefault("prog", explain.program(" ".join(sys.argv[1:2])))  # of the parsers for options of classes
        super().__init__(*args, allow_abbrev=allow_abbrev, **kwargs)

    def parse_args(self, args: Any = None, *more: Any, **kwargs: Any) -> Any:  # noqa: D102
        if parses_class_options(self) and args and len(args) == 1:  # an option of a class
            args = [as_yaml(args[0])]
        return super().parse_args(args, *more, **kwargs)

    def add_class_arguments(self, theclass: type, *args: Any, **kwargs: Any) -> list[str]:  # noqa: D102
        added = super().add_class_arguments(theclass, *args, **kwargs)
        if inspect.isclass(theclass) and issubclass(theclass, Logger) and "save_dir" in added:
            self.set_defaults(save_dir=runs.PLACEHOLDER)
        return added


def add_options(parser: LightningArgumentParser) -> None:
    """Adds the options that Lightning does not have."""
    parser.add_argument(
        "--name", type=Optional[str], help="Name of the experiment. Default: the name of the first config file."
    )
    parser.add_argument("--runs_dir", type=str, default="runs", help="Folder of all runs: <runs_dir>/<name>/<time>.")
    parser.add_argument(
        "--export",
        type=Weights,
        default="best",
        help="Weights to save in model/ at the end of training: those of the best checkpoint (see --best.monitor) or "
        "those of the last step.",
    )
    parser.add_lightning_class_args(Checkpoints, "best")
    parser.set_defaults({f"best.{k}": v for k, v in CHECKPOINTS.items()})
    parser.set_defaults({"best.filename": "best"})
    parser.add_lightning_class_args(Checkpoints, "last")
    parser.set_defaults({f"last.{k}": v for k, v in CHECKPOINTS.items()})
    parser.set_defaults({"last.filename": "last"})
    parser.add_lightning_class_args(Predictions, "predictions")


def as_yaml(argument: str) -> str:
    """Converts a flag's value back to YAML if jsonargparse has converted it to Python syntax, such as `--path=None`."""
    name, _, value = argument.partition("=")
    if value == "None" or value[:1] in ("[", "{"):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError):
            return f"{name}={json.dumps(ast.literal_eval(value))}"
    return argument
