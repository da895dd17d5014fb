"""The guide at the start of the help of `fit`, `validate`, `test` and `predict`."""

from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterable
from pathlib import Path

from jsonargparse import DefaultHelpFormatter

from lm_lightning.cli import explain


class Help(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Help formatter that keeps the lines of the description."""


TRAINING = """Trains a model.

  {program} --config configs/gpt.yaml
  {program} --config configs/gpt.yaml --data.corpus.paths my_text.txt --trainer.max_steps 1000
  {program} --config my.yaml --config more.yaml --model.optimizer.lr 1e-3

{recipes}A config chooses the classes of the model and of the data. These commands explain their options:

  {program} --model.help {models}
  {program} --data.help {data}

Likewise for other classes: --trainer.callbacks.help EarlyStopping, --trainer.logger.help CSVLogger, ...
--print_config prints all settings instead of training. The most common options:

  --name, --runs_dir                set the run folder, which is <runs_dir>/<name>/<time>
  --ckpt_path last                  resume the newest run of that name
  --trainer.max_steps, --trainer.max_epochs
                                    length of the training
  --trainer.devices, --trainer.strategy
                                    number of processes, and how they share the work
  --data.batch_size                 samples per micro-batch and process
  --trainer.accumulate_grad_batches micro-batches per optimizer step
  --model.pretrained                weights to start from: a folder, a run or a Hub name
  --model.network                   a new network instead, such as '{{model_type: gpt2, n_layer: 4}}'
  --model.optimizer.lr              learning rate
  --best.monitor, --best.mode       metric that decides which checkpoint is the best

All options:"""
EVALUATION = """{what} All settings are those of the run, except for the options that you give.

  {program} runs/gpt/2026-11-25_10-30-00
  {program} runs/gpt/2026-11-25_10-30-00 --ckpt_path last --data.corpus.paths other_text.txt
  {program} --config configs/gpt.yaml --ckpt_path last

The most common options:

  --ckpt_path last              last, best or the path of a checkpoint; default: the weights in model/
  --data.batch_size             samples per batch and process
  --trainer.devices, --trainer.strategy
                                as for fit; default: those of the training
  --data.tables, --data.corpus  other files than those of the training
  --trainer.limit_{split}_batches
                                maximum number of batches

These options explain those of the model and of the data:

  --model.help {models}
  --data.help {data}

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


def command_texts(commands: Iterable[str], model: type, data: type) -> dict[str, dict[str, str]]:
    """Usage and description of each command.

    Args:
        commands: The names of the commands.
        model: Base class of all models.
        data: Base class of all data modules.
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
            models=class_names(model, "CausalLM"),
            data=class_names(data, "PretrainingData"),
            split=split,
        )
        of_run = "" if command == "fit" else f"{program} RUN [--option VALUE ...], or "
        found[command] = {"description": description, "usage": f"{of_run}{program} --config FILE [--option VALUE ...]"}
    return found


def class_names(base: type, first: str) -> str:
    """The names of this project's subclasses of a class, in one line that begins with `first`."""
    return f"{first}  (or {', '.join(sorted(explain.own_classes(base).keys() - {first}))})"
