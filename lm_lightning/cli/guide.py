"""The guide with which the help of `fit` and the other commands of the CLI begins."""

from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterable
from pathlib import Path

from jsonargparse import DefaultHelpFormatter

from lm_lightning.cli import explain


class Help(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Help with the lines of a description as they are."""


TRAINING = """Trains a model.

  {program} --config configs/gpt.yaml
  {program} --config configs/gpt.yaml --data.corpus.paths my_text.txt --trainer.max_steps 1000
  {program} --config my.yaml --config more.yaml --model.optimizer.lr 1e-3

{recipes}A config chooses the classes of the model and the data. Their options are explained by

  {program} --model.help {models}
  {program} --data.help {data}

and the options of other classes by --trainer.callbacks.help EarlyStopping, --trainer.logger.help CSVLogger, ...
--print_config prints all settings instead of training. The most common options:

  --name, --runs_dir                place of the run folder: <runs_dir>/<name>/<time>
  --ckpt_path last                  resume the newest run of that name
  --trainer.max_steps, max_epochs   length of the training
  --trainer.devices, strategy       processes and how they share the work
  --data.batch_size                 samples in a micro-batch of one process
  --trainer.accumulate_grad_batches micro-batches in an optimizer step
  --model.pretrained                weights to start from: a folder, a run or a Hub name
  --model.network                   or a new network, such as '{{model_type: gpt2, n_layer: 4}}'
  --model.optimizer.lr              the learning rate
  --best.monitor, --best.mode       metric that decides which checkpoint is the best

All options:"""
EVALUATION = """{what} Settings that you do not change are those of the run.

  {program} runs/gpt/2026-11-25_10-30-00
  {program} runs/gpt/2026-11-25_10-30-00 --ckpt_path last --data.corpus.paths other_text.txt
  {program} --config configs/gpt.yaml --ckpt_path last

The most common options:

  --ckpt_path last              last, best or the path of a checkpoint; default: model/
  --data.batch_size             samples in a batch of one process
  --trainer.devices, strategy   as for fit; default: those of the training
  --data.tables, data.corpus    other files than those of the training
  --trainer.limit_{split}_batches
                                limit of the number of batches

Options of the model and the data are explained by --model.help {models}
and --data.help {data}.

All options:"""
COMMANDS = {
    "fit": (TRAINING, "", ""),
    "validate": (EVALUATION, "Computes the metrics of a run or a checkpoint on the validation split.", "val"),
    "test": (EVALUATION, "Computes the metrics of a run or a checkpoint on the test split.", "test"),
    "predict": (
        EVALUATION,
        "Writes predictions of a run or a checkpoint for the test split.",
        "predict",
    ),
}


def of_commands(commands: Iterable[str], model: type, data: type) -> dict[str, dict[str, str]]:
    """Usage and description of each command.

    Args:
        commands: Their names.
        model: Base of all models.
        data: Base of all data modules.
    """
    recipes = ", ".join(file.stem for file in sorted(Path("configs").glob("*.yaml")))
    found = {}
    for command in commands:
        guide, what, split = COMMANDS[command]
        program = explain.program(command)
        description = guide.format(
            what=what,
            program=program,
            recipes=f"Recipes in configs/: {recipes}.\n" if recipes else "",
            models=one_line(model, "CausalLM"),
            data=one_line(data, "PretrainingData"),
            split=split,
        )
        of_run = "" if command == "fit" else f"{program} RUN [--option VALUE ...], or "
        found[command] = {"description": description, "usage": f"{of_run}{program} --config FILE [--option VALUE ...]"}
    return found


def one_line(base: type, first: str) -> str:
    """The classes of a kind that this project has, one of them first."""
    own = [name for name, kind in explain.subclasses(base).items() if kind.__module__.startswith("lm_lightning.")]
    own = [name for name in own if not name.startswith(("Labelled", "Stream"))]
    return f"{first}  (or {', '.join(sorted(set(own) - {first}))})"
