"""`prepare`: a corpus in, shards and a look at them out."""

import sys
from typing import Any

from lm_lightning.errors import UserError

DEFAULT = "PretrainingData"


def prepare() -> None:
    """Tokenizes a corpus, so that later runs start at once, and prints statistics of it.

    The data module does the work, see `PretrainingData.prepare_corpus`.
    """


def main() -> None:
    """Reads the command line: `--config` as `fit` reads it, of which only the data section is used, and flags."""
    from lm_lightning.cli import command, explain, settings

    recipe, files, rest = settings.layered(sys.argv[2:])
    parser = command.parser_of(prepare, options=False)
    parser.add_argument("-c", "--config", type=str, help="Config file, as for fit; only its data section is used.")
    parser.add_argument("--show", type=int, nargs="+", default=[], help="Training samples to print, by number.")
    name, section = data_section(recipe, " and ".join(files))
    if {"-h", "--help"} & set(rest):  # without the imports of the data module, which take seconds
        parser.epilog = f"all flags --data.* of fit: {explain.program('fit')} --data.help {name.rpartition('.')[2]}"
        parser.parse_args(["--help"])
    data_class = class_named(name)
    if not hasattr(data_class, "prepare_corpus"):
        raise UserError(
            f"{' and '.join(files)} uses data from {name}, which prepare cannot tokenize: `fit` does it itself"
        )
    parser.add_class_arguments(data_class, "data")
    for option, value in section.items():
        try:
            parser.set_defaults({f"data.{option}": value})
        except KeyError as error:
            raise UserError(f"{', '.join(files)}: data.{option} has an option that is not known: {error}") from error
    given = parser.instantiate_classes(parser.parse_args(rest))
    given.data.prepare_corpus(given.show)


def data_section(recipe: dict[str, Any], files: str) -> tuple[str, dict[str, Any]]:
    """The class of the data in a recipe, by default `PretrainingData`, and its options.

    Args:
        recipe: Its options.
        files: Where they are from, for messages.
    """
    data = recipe.get("data") or {}
    if not isinstance(data, dict):
        raise UserError(f"{files} is no recipe: its data section has no options by name")
    options = data.get("init_args") or {name: value for name, value in data.items() if name != "class_path"}
    return str(data.get("class_path", DEFAULT)), options


def class_named(name: str) -> Any:
    """The class of a data module, by its class path or its short name; None if there is none."""
    from lightning.pytorch import LightningDataModule

    from lm_lightning import features
    from lm_lightning.cli import explain
    from lm_lightning.data.pretraining import PretrainingData
    from lm_lightning.security import imports

    if name.rpartition(".")[2] == DEFAULT:
        return PretrainingData  # found without the imports of all tasks, which take seconds
    if "." in name:
        return imports.locate(name)
    features.import_classes()
    return explain.subclasses(LightningDataModule).get(name)
