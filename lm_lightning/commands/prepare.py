"""`prepare`: tokenizes a corpus and prints statistics or samples of it."""

import sys
from typing import TYPE_CHECKING, Any, Optional

from lm_lightning.console import printable
from lm_lightning.data.corpus import Corpus
from lm_lightning.data.tokenizer import Tokenizer
from lm_lightning.errors import UserError

if TYPE_CHECKING:
    from lm_lightning.data.pretraining import PretrainingData
    from lm_lightning.data.shards import Packing, Prepared


def prepare(
    corpus: Corpus = Corpus(),
    tokenizer: Tokenizer = Tokenizer(),
    block_size: int = 256,
    cache_dir: str = "~/.cache/lm_lightning",
    show: list[int] = [],  # noqa: B006 (read only)
) -> None:
    """Tokenizes a corpus, so that a run that uses it starts at once, and prints what is in it.

    `--config` is a config of fit, of which the data section is used.

    Args:
        corpus: Where the documents come from.
        tokenizer: Which tokenizer turns them into tokens.
        block_size: Tokens of a block.
        cache_dir: Folder that keeps trained tokenizers and tokenized corpora.
        show: Training samples (numbers of blocks) to print, as messages and logs name them.
    """
    from lm_lightning.data.shards import Layout, Packing
    from lm_lightning.data.shards import prepare as prepare_shards

    if block_size < 1:
        raise UserError(f"data.block_size is {block_size}, but must be 1 or more")
    report(prepare_shards(corpus, tokenizer, Layout(), cache_dir), Packing(block_size, context=1), show)


def prepare_data(data: "PretrainingData", show: list[int]) -> None:
    """As `prepare`, for a data module of another class."""
    from lm_lightning.data.shards import prepare as prepare_shards

    data.check()
    prepared = prepare_shards(data.corpus, data.tokenizer_options, data.layout(), data.cache_dir)
    report(prepared, data.packing(prepared.tokenizer), show)


def report(prepared: "Prepared", packing: "Packing", show: list[int]) -> None:
    """Prints statistics of a corpus, or training samples.

    Args:
        prepared: The corpus.
        packing: How its tokens are cut into samples.
        show: Numbers of samples.

    Raises:
        UserError: If there is no such sample.
    """
    if not show:
        return print_statistics(prepared, packing)
    if packing.note:
        print(packing.note)
    tokens, size = prepared.split("train").tokens, packing.size
    for sample in show:
        text = tokens[sample * size : (sample + 1) * size]
        if len(text) == 0 or sample < 0:
            raise UserError(f"there is no sample {sample}: the training split has {len(tokens) // size}")
        print(f"--- sample {sample}\n{printable(prepared.tokenizer.decode(text))}")


def print_statistics(prepared: "Prepared", packing: "Packing") -> None:
    """Prints the sizes of the splits."""
    from lm_lightning.data.shards import SPLITS

    print(
        f"{prepared.folder}\n{'split':12}{'documents':>12}{'tokens':>14}{'bytes':>14}{'bytes/token':>13}{'blocks':>10}"
    )
    for name in SPLITS:
        counts = prepared.info["splits"][name]
        targets = max(0, counts["tokens"] - packing.context)
        blocks = targets // packing.size if name in packing.full else -(-targets // packing.size)
        unknown = prepared.about_unknown(name)
        print(
            f"{name:12}{counts['documents']:12,}{counts['tokens']:14,}{counts['bytes']:14,}"
            f"{counts['bytes'] / max(1, counts['tokens']):13.2f}{blocks:10,}{unknown}"
        )
    perplexity = prepared.info["splits"]["validation"]["unigram_perplexity"]
    print(f"vocabulary {len(prepared.tokenizer):,}, unigram perplexity of the validation split {perplexity:.1f}")


def main() -> None:
    """Reads the command line: `--config` as for `fit`, of which the data section is used, and flags."""
    from lm_lightning.cli import command, settings

    recipe, files, rest = settings.layered(sys.argv[2:])
    parser = command.parser_of(prepare, options=False)
    parser.add_argument("-c", "--config", type=str, help="Config as for fit, of which the data section is used.")
    parser.add_argument("--show", type=int, nargs="+", default=[], help="Training samples to print, by their numbers.")
    data_class, section = data_section(recipe, " and ".join(files))
    if data_class is None:
        added = parser.add_function_arguments(prepare, "data", skip={"show"})
    else:
        added = parser.add_class_arguments(data_class, "data")
    options = {name.removeprefix("data.") for name in added}
    for name, value in section.items():
        if name in options:
            try:
                parser.set_defaults({f"data.{name}": value})
            except KeyError as error:
                raise UserError(f"{', '.join(files)}: data.{name} has an unknown option: {error}") from error
    given = parser.instantiate_classes(parser.parse_args(rest))
    if data_class is None:
        prepare(**vars(given.data), show=given.show)
    else:
        prepare_data(given.data, given.show)


def data_section(recipe: dict[str, Any], files: str) -> tuple[Optional[type], dict[str, Any]]:
    """The class of the data in a config and its options; None for PretrainingData itself.

    Args:
        recipe: Options of the config.
        files: Its files, for messages.

    Raises:
        UserError: If it is of a class whose data is not a corpus.
    """
    data = recipe.get("data") or {}
    if not isinstance(data, dict):
        raise UserError(f"the data section of {files} must have options by name, such as `block_size: 256`")
    path = str(data.get("class_path", ""))
    options = data.get("init_args") or {name: value for name, value in data.items() if name != "class_path"}
    return None if path.rpartition(".")[2] in ("", "PretrainingData") else find_class(path, files), options


def find_class(path: str, files: str) -> type:
    """The subclass of PretrainingData with an import path or a short name.

    Raises:
        UserError: If there is none.
    """
    from lm_lightning import features  # not before they are needed: these imports take seconds
    from lm_lightning.cli import explain
    from lm_lightning.data.pretraining import PretrainingData
    from lm_lightning.security import imports

    features.import_classes()
    found = imports.locate(path) if "." in path else explain.subclasses(PretrainingData).get(path)
    if not isinstance(found, type) or not issubclass(found, PretrainingData):
        raise UserError(
            f"prepare supports data of PretrainingData and its subclasses, but {files} has {path}: `fit` prepares it"
        )
    return found
