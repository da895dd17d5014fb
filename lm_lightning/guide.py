"""The guide with which the help of `fit` and the other commands of the CLI begins."""

from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from jsonargparse import DefaultHelpFormatter

from lm_lightning import explain


class Help(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Help with the lines of a description as they are."""


GUIDE = """{what}

  {program} --config configs/gpt.yaml
  {program} --config configs/gpt.yaml --data.corpus.paths my_text.txt --trainer.max_steps 1000
  {program} --config my.yaml --config more.yaml --model.optimizer.lr 1e-3

{recipes}A recipe chooses the classes of the model and the data, whose options are explained by

  {program} --model.help {models}
  {program} --data.help {data}

and those of other classes by --trainer.callbacks.help EarlyStopping, --trainer.logger.help CSVLogger, ...
--print_config prints all settings instead of {doing}. The options that are needed most:

  --name, --runs_dir                where the run folder is: <runs_dir>/<name>/<time>
  --ckpt_path last                  {checkpoint}
  --trainer.max_steps, max_epochs   how long it trains
  --trainer.devices, strategy       what it runs on
  --data.batch_size                 samples in a micro-batch of one process
  --trainer.accumulate_grad_batches micro-batches of an optimizer step
  --model.pretrained                weights to start from: a folder, a run or a Hub name
  --model.network                   or a new network, such as '{{model_type: gpt2, n_layer: 4}}'
  --model.optimizer.lr              the learning rate
  --best.monitor, --best.mode       the metric that says which checkpoint is the best one

All options:"""
OF_RUN = "Settings that no option changes are those of the run."
LAST = "the last checkpoint, or best, or a file; default: model/"
COMMANDS = {
    "fit": ("Trains a model.", "training", "resumes the last run of that name"),
    "validate": (f"Measures a run or a checkpoint on the validation split. {OF_RUN}", "measuring", LAST),
    "test": (f"Measures a run or a checkpoint on the test split. {OF_RUN}", "measuring", LAST),
    "predict": (f"Predicts with a run or a checkpoint. {OF_RUN}", "predicting", LAST),
}


def of_commands(model: type, data: type) -> dict[str, dict[str, str]]:
    """Usage and description of each command.

    Args:
        model: Base of all models.
        data: Base of all data modules.
    """
    recipes = ", ".join(file.stem for file in sorted(Path("configs").glob("*.yaml")))
    found = {}
    for command, (what, doing, checkpoint) in COMMANDS.items():
        program = explain.program(command)
        guide = GUIDE.format(
            what=what,
            program=program,
            recipes=f"Recipes in configs/: {recipes}.\n" if recipes else "",
            models=one_line(model, "CausalLM"),
            data=one_line(data, "PretrainingData"),
            doing=doing,
            checkpoint=checkpoint,
        )
        of_run = "" if command == "fit" else f"{program} RUN [--option VALUE ...], or "
        found[command] = {"description": guide, "usage": f"{of_run}{program} --config FILE [--option VALUE ...]"}
    return found


def one_line(base: type, first: str) -> str:
    """The classes of a kind that this project has, one of them first."""
    own = [name for name, kind in explain.subclasses(base).items() if kind.__module__.startswith("lm_lightning.")]
    own = [name for name in own if not name.startswith(("Labelled", "Stream"))]
    return f"{first}  (or {', '.join(sorted(set(own) - {first}))})"
