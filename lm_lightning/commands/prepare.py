"""`prepare`: tokenizes a corpus to shards, and prints statistics and samples of them."""

import inspect
import sys
from typing import Any

from lm_lightning.errors import UserError

DEFAULT = "PretrainingData"


def prepare() -> None:
    """Tokenizes a corpus, so that later runs start at once, and prints its statistics."""


def main() -> None:
    """Reads the command line: flags, and `--config` like `fit`, but only its data section is used."""
    from lm_lightning.cli import command, explain, settings

    recipe, files, rest = settings.read_layered(sys.argv[2:])
    parser = command.make_parser(prepare, options=False)
    parser.add_argument("-c", "--config", type=str, help="Config file of a run; only its data section is used.")
    parser.add_argument("--show", type=int, nargs="+", default=[], help="Numbers of training samples to print instead.")
    name, section = data_section(recipe, " and ".join(files))
    if {"-h", "--help"} & set(rest):  # before the data module is imported, which takes seconds
        shown = f"{explain.program('fit')} --data.help {name.rpartition('.')[2]}"
        parser.epilog = f"All flags --data.* of fit are options, too: {shown}"
        parser.parse_args(["--help"])
    data_class = class_named(name)
    if not hasattr(data_class, "prepare_corpus"):
        raise UserError(
            f"{' and '.join(files)} uses {name}, whose data `prepare` does not tokenize: run `fit`, which does"
        )
    parser.add_class_arguments(data_class, "data")
    for option, value in section.items():
        try:
            parser.set_defaults({f"data.{option}": value})
        except KeyError as error:
            raise UserError(f"{', '.join(files)}: data.{option} has an unknown option: {error}") from error
    given = parser.instantiate_classes(parser.parse_args(rest))
    given.data.prepare_corpus(given.show)


def data_section(recipe: dict[str, Any], files: str) -> tuple[str, dict[str, Any]]:
    """The data module's class in a recipe, `PretrainingData` by default, and its options.

    Args:
        recipe: The options of the recipe.
        files: The config files that contain them, for messages.
    """
    data = recipe.get("data") or {}
    if not isinstance(data, dict):
        raise UserError(f"the data section of {files} has no options by name, such as `data: {{batch_size: 8}}`")
    options = data.get("init_args") or {name: value for name, value in data.items() if name != "class_path"}
    return str(data.get("class_path", DEFAULT)), options


def class_named(name: str) -> Any:
    """The data module with a class path or short name.

    Raises:
        UserError: If there is none.
    """
    from lightning.pytorch import LightningDataModule

    from lm_lightning import features
    from lm_lightning.cli import explain
    from lm_lightning.data.pretraining import PretrainingData
    from lm_lightning.security import imports

    features.import_data_classes()
    if name.rpartition(".")[2] == DEFAULT:
        return PretrainingData  # without importing all tasks, which takes seconds
    features.import_classes()
    found = imports.locate(name) if "." in name else explain.subclasses(LightningDataModule).get(name)
    if not (inspect.isclass(found) and issubclass(found, LightningDataModule)):
        raise UserError(
            f"data is {name!r:.200}, which is not a subclass of LightningDataModule: use one of "
            f"{', '.join(explain.own_classes(LightningDataModule))}"
        )
    return found
