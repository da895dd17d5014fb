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

{recipes}A recipe chooses the classes of the model and the data, whose options are explained by

  {program} --model.help {models}
  {program} --data.help {data}

and those of other classes by --trainer.callbacks.help EarlyStopping, --trainer.logger.help CSVLogger, ...
--print_config prints all settings instead of training. The options that are needed most:

  --name, --runs_dir                where the run folder is: <runs_dir>/<name>/<time>
  --ckpt_path last                  resumes the last run of that name
  --trainer.max_steps, max_epochs   how long it trains
  --trainer.devices, strategy       what it runs on
  --data.batch_size                 samples in a micro-batch of one process
  --trainer.accumulate_grad_batches micro-batches of an optimizer step
  --model.pretrained                weights to start from: a folder, a run or a Hub name
  --model.network                   or a new network, such as '{{model_type: gpt2, n_layer: 4}}'
  --model.optimizer.lr              the learning rate
  --best.monitor, --best.mode       the metric that says which checkpoint is the best one

All options:"""
EVALUATION = """{what} Settings that no option changes are those of the run.

  {program} runs/gpt/2026-11-25_10-30-00
  {program} runs/gpt/2026-11-25_10-30-00 --ckpt_path last --data.corpus.paths other_text.txt
  {program} --config configs/gpt.yaml --ckpt_path last

The options that are needed most:

  --ckpt_path last              the last checkpoint, or best, or a file; default: model/
  --data.batch_size             samples in a batch of one process
  --trainer.devices, strategy   what it runs on; default: as the training
  --data.tables, data.corpus    other files than those of the run
  --trainer.limit_{split}_batches
                                evaluates so many batches only

Options of the model and the data are explained by --model.help {models}
and --data.help {data}.

All options:"""
COMMANDS = {
    "fit": (TRAINING, "", ""),
    "validate": (EVALUATION, "Measures a run or a checkpoint on the validation split.", "val"),
    "test": (EVALUATION, "Measures a run or a checkpoint on the test split.", "test"),
    "predict": (EVALUATION, "Predicts with a run or a checkpoint.", "predict"),
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
