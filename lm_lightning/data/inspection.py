"""Prints samples and statistics of a tokenized corpus."""

import itertools
from collections.abc import Collection, Mapping, Sequence

from lm_lightning.console import printable
from lm_lightning.data.shards import SPLITS, Prepared
from lm_lightning.errors import UserError


def first_ids(tokens: Mapping[str, int], size: int) -> dict[str, int]:
    """The number of the first sample of each corpus, so that all samples have different numbers.

    Args:
        tokens: Number of tokens of each corpus.
        size: Number of tokens of a sample.
    """
    ends = itertools.accumulate(-(-count // size) for count in tokens.values())
    return dict(zip(tokens, [0, *ends]))


def print_samples(parts: Mapping[str, Prepared], size: int, samples: Sequence[int]) -> None:
    """Prints training samples.

    Args:
        parts: The corpora by their names.
        size: Number of tokens of a sample.
        samples: Numbers of the samples, from 0.

    Raises:
        UserError: If a sample does not exist.
    """
    tokens = {name: part.split("train").tokens for name, part in parts.items()}
    first = first_ids({name: len(own) for name, own in tokens.items()}, size)
    for sample in samples:
        name = [name for name, start in first.items() if start <= max(0, sample)][-1]
        own = sample - first[name]
        text = tokens[name][own * size : (own + 1) * size]
        if len(text) == 0 or sample < 0:
            number = sum(len(own) // size for own in tokens.values())
            raise UserError(f"there is no sample {sample}: the training split has {number} samples")
        print(f"--- sample {sample}{name and f' ({name})'}\n{printable(parts[name].tokenizer.decode(text))}")


def print_counts(parts: Mapping[str, Prepared], size: int, omitted: int, full: Collection[str] = ("train",)) -> None:
    """Prints the sizes of the splits.

    Args:
        parts: The corpora by their names; a single one has the name "".
        size: Number of tokens of a sample.
        omitted: Number of tokens at the beginning that are not targets.
        full: Splits whose last sample is omitted if it is incomplete.
    """
    for corpus, prepared in parts.items():
        print(
            f"{corpus and f'{corpus}: '}{prepared.folder}\n"
            f"{'split':12}{'documents':>12}{'tokens':>14}{'bytes':>14}{'bytes/token':>13}{'blocks':>10}"
        )
        for name in SPLITS:
            counts = prepared.info["splits"][name]
            targets = max(0, counts["tokens"] - omitted)
            blocks = targets // size if name in full else -(-targets // size)  # the same number as in `fit`
            unknown = prepared.about_unknown(name)
            print(
                f"{name:12}{counts['documents']:12,}{counts['tokens']:14,}{counts['bytes']:14,}"
                f"{counts['bytes'] / max(1, counts['tokens']):13.2f}{blocks:10,}{unknown}"
            )
        if filtered := prepared.info.get("filtered"):
            left, given = (filtered[count]["documents"] for count in ("after", "before"))
            print(f"filters: {left:,} of {given:,} documents are left, {filtered['listing']} lists the others")
        perplexity = prepared.info["splits"]["validation"]["unigram_perplexity"]
        print(f"vocabulary {len(prepared.tokenizer):,}, unigram perplexity of the validation split {perplexity:.1f}")
