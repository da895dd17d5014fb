"""`prepare`: a corpus in, shards and a look at them out."""

import sys
from typing import TYPE_CHECKING, Any

from lm_lightning.console import printable
from lm_lightning.data.corpus import Corpus
from lm_lightning.data.tokenizer import Tokenizer
from lm_lightning.errors import UserError

if TYPE_CHECKING:
    from lm_lightning.data.shards import Prepared
    from lm_lightning.tasks.masked_lm.data import MaskedData


def prepare(
    corpus: Corpus = Corpus(),
    tokenizer: Tokenizer = Tokenizer(),
    block_size: int = 256,
    cache_dir: str = "~/.cache/lm_lightning",
    show: list[int] = [],  # noqa: B006 (read only)
) -> None:
    """Tokenizes a corpus, so that a run that uses it starts at once, and prints what is in it.

    `--config` takes a recipe; of it, the options of the data are used.

    Args:
        corpus: Where the documents come from.
        tokenizer: Which tokenizer turns them into tokens.
        block_size: Tokens of a block.
        cache_dir: Folder that keeps trained tokenizers and tokenized corpora.
        show: Training samples (numbers of blocks) to print, as messages and logs name them.
    """
    from lm_lightning.data.shards import Layout
    from lm_lightning.data.shards import prepare as prepare_shards

    if block_size < 1:
        raise UserError(f"data.block_size is {block_size}, but must be 1 or more")
    prepared = prepare_shards(corpus, tokenizer, Layout(), cache_dir)
    if show:
        show_samples(prepared, block_size, show)
    else:
        count(prepared, block_size, left_out=1)


def prepare_masked(data: "MaskedData", show: list[int]) -> None:
    """The same for a BERT, whose samples are shown with nothing hidden."""
    from lm_lightning.data.shards import prepare as prepare_shards

    data.check()
    prepared = prepare_shards(data.corpus, data.tokenizer_options, data.layout(), data.cache_dir)
    room = data.room(prepared.tokenizer)
    if not show:
        return count(prepared, room, left_out=0, full=() if data.next_sentence else ("train",))
    if data.next_sentence:
        print("of a pair: where its first segment is; the second one may be of any document, and is another each epoch")
    show_samples(prepared, room, show)


def show_samples(prepared: "Prepared", size: int, show: list[int]) -> None:
    """Prints training samples.

    Args:
        prepared: The corpus.
        size: Tokens of a sample.
        show: Their numbers.
    """
    tokens = prepared.split("train").tokens
    for sample in show:
        text = tokens[sample * size : (sample + 1) * size]
        if len(text) == 0 or sample < 0:
            raise UserError(f"there is no sample {sample}: the training split has {len(tokens) // size}")
        print(f"--- sample {sample}\n{printable(prepared.tokenizer.decode(text))}")


def count(prepared: "Prepared", size: int, left_out: int, full: tuple[str, ...] = ("train",)) -> None:
    """Prints what is in the splits.

    Args:
        prepared: The corpus.
        size: Tokens of a sample.
        left_out: Tokens at the beginning that are no targets.
        full: Splits without a sample at their end that is not full.
    """
    from lm_lightning.data.shards import SPLITS

    print(
        f"{prepared.folder}\n{'split':12}{'documents':>12}{'tokens':>14}{'bytes':>14}{'bytes/token':>13}{'blocks':>10}"
    )
    for name in SPLITS:
        counts = prepared.info["splits"][name]
        targets = max(0, counts["tokens"] - left_out)
        blocks = targets // size if name in full else -(-targets // size)  # as `fit` takes them
        unknown = prepared.about_unknown(name)
        print(
            f"{name:12}{counts['documents']:12,}{counts['tokens']:14,}{counts['bytes']:14,}"
            f"{counts['bytes'] / max(1, counts['tokens']):13.2f}{blocks:10,}{unknown}"
        )
    perplexity = prepared.info["splits"]["validation"]["unigram_perplexity"]
    print(f"vocabulary {len(prepared.tokenizer):,}, unigram perplexity of the validation split {perplexity:.1f}")


def main() -> None:
    """Reads the command line: `--config` as `fit` takes it, of which the options of the data count, and flags."""
    from lm_lightning.cli import command, settings

    recipe, files, rest = settings.layered(sys.argv[2:])
    parser = command.parser_of(prepare, options=False)
    parser.add_argument("-c", "--config", type=str, help="Recipe as for fit; of it, the options of the data count.")
    parser.add_argument("--show", type=int, nargs="+", default=[], help="Training samples to print, by their numbers.")
    kind, section = data_section(recipe, " and ".join(files))
    masked = kind == "MaskedData"
    if masked:
        from lm_lightning.tasks.masked_lm.data import MaskedData  # not before it is needed: it takes seconds

        added = parser.add_class_arguments(MaskedData, "data")
    else:
        added = parser.add_function_arguments(prepare, "data", skip={"show"})
    options = {name.removeprefix("data.") for name in added}
    for name, value in section.items():
        if name in options:
            try:
                parser.set_defaults({f"data.{name}": value})
            except KeyError as error:
                raise UserError(f"{', '.join(files)}: data.{name} has an option that is not known: {error}") from error
    given = parser.instantiate_classes(parser.parse_args(rest))
    if masked:
        prepare_masked(given.data, given.show)
    else:
        prepare(**vars(given.data), show=given.show)


def data_section(recipe: dict[str, Any], files: str) -> tuple[str, dict[str, Any]]:
    """The class of the data in a recipe, "" if it says none, and its options.

    Args:
        recipe: Its options.
        files: Where they are from, for messages.
    """
    data = recipe.get("data") or {}
    if not isinstance(data, dict):
        raise UserError(f"{files} is no recipe: its data section has no options by name")
    kind = str(data.get("class_path", "")).rpartition(".")[2]
    if kind not in ("", "PretrainingData", "MaskedData"):  # its documents become other tokens than would be shown here
        raise UserError(
            f"{files} takes its data from {kind}, which prepare does not know yet: `fit` tokenizes it itself"
        )
    return kind, data.get("init_args") or {name: value for name, value in data.items() if name != "class_path"}
