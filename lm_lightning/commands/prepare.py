"""`prepare`: a corpus in, shards and a look at them out."""

import sys
from pathlib import Path
from typing import Any

from lm_lightning.data.corpus import Corpus
from lm_lightning.data.tokenizer import Tokenizer
from lm_lightning.errors import UserError


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
    from lm_lightning.data.shards import SPLITS, Layout
    from lm_lightning.data.shards import prepare as prepare_shards

    if block_size < 1:
        raise UserError(f"data.block_size is {block_size}, but must be 1 or more")
    prepared = prepare_shards(corpus, tokenizer, Layout(), cache_dir)
    if show:
        tokens = prepared.split("train").tokens
        for sample in show:
            text = tokens[sample * block_size : (sample + 1) * block_size]
            if len(text) == 0 or sample < 0:
                raise UserError(f"there is no sample {sample}: the training split has {len(tokens) // block_size}")
            print(f"--- sample {sample}\n{prepared.tokenizer.decode(text)}")
        return
    print(
        f"{prepared.folder}\n{'split':12}{'documents':>12}{'tokens':>14}{'bytes':>14}{'bytes/token':>13}{'blocks':>10}"
    )
    for name in SPLITS:
        counts = prepared.info["splits"][name]
        targets = max(0, counts["tokens"] - 1)
        blocks = targets // block_size if name == "train" else -(-targets // block_size)  # as `fit` takes them
        print(
            f"{name:12}{counts['documents']:12,}{counts['tokens']:14,}{counts['bytes']:14,}"
            f"{counts['bytes'] / max(1, counts['tokens']):13.2f}{blocks:10,}"
        )
    perplexity = prepared.info["splits"]["validation"]["unigram_perplexity"]
    print(f"vocabulary {len(prepared.tokenizer):,}, unigram perplexity of the validation split {perplexity:.1f}")


def main() -> None:
    """Reads the command line: `--config` as `fit` takes it, of which the options of the data count, and flags."""
    import argparse

    from jsonargparse import ArgumentParser

    recipes = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    recipes.add_argument("-c", "--config", action="append", default=[])
    known, rest = recipes.parse_known_args(sys.argv[2:])

    parser = ArgumentParser(
        prog="lm_lightning prepare", description=(prepare.__doc__ or "").split("\n\n")[0], exit_on_error=False
    )
    parser.add_argument("-c", "--config", type=str, help="Recipe as for fit; of it, the options of the data count.")
    parser.add_argument("--show", type=int, nargs="+", default=[], help="Training samples to print, by their numbers.")
    added = parser.add_function_arguments(prepare, "data", skip={"show"})
    options = {name.removeprefix("data.") for name in added}
    for recipe in known.config:
        for name, value in data_section(recipe).items():
            if name in options:
                try:
                    parser.set_defaults({f"data.{name}": value})
                except KeyError as error:
                    raise UserError(f"{recipe}: data.{name} has an option that is not known: {error}") from error
    given = parser.instantiate_classes(parser.parse_args(rest))
    prepare(**vars(given.data), show=given.show)


def data_section(recipe: str) -> dict[str, Any]:
    """The options of the data in a recipe's YAML."""
    import yaml

    try:
        content = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the recipe {recipe}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not isinstance(content.get("data", {}), dict):
        raise UserError(f"{recipe} is no recipe: it has no options by name, or its data section has none")
    data = dict(content.get("data") or {})
    kind = str(data.get("class_path", "PretrainingData")).rpartition(".")[2]
    if kind != "PretrainingData":  # its documents become other tokens than those that would be shown here
        raise UserError(
            f"{recipe} takes its data from {kind}, which prepare does not know yet: `fit` tokenizes it itself"
        )
    return data.get("init_args") or {name: value for name, value in data.items() if name != "class_path"}
