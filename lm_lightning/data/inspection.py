"""Prints samples and statistics of a tokenized corpus."""

from collections.abc import Collection, Sequence

from lm_lightning.console import printable
from lm_lightning.data.shards import SPLITS, Prepared
from lm_lightning.errors import UserError


def print_samples(prepared: Prepared, size: int, samples: Sequence[int]) -> None:
    """Prints training samples.

    Args:
        prepared: The corpus.
        size: Number of tokens of a sample.
        samples: Numbers of the samples, from 0.

    Raises:
        UserError: If a sample does not exist.
    """
    tokens = prepared.split("train").tokens
    for sample in samples:
        text = tokens[sample * size : (sample + 1) * size]
        if len(text) == 0 or sample < 0:
            raise UserError(f"there is no sample {sample}: the training split has {len(tokens) // size} samples")
        print(f"--- sample {sample}\n{printable(prepared.tokenizer.decode(text))}")


def print_counts(prepared: Prepared, size: int, omitted: int, full: Collection[str] = ("train",)) -> None:
    """Prints the sizes of the splits.

    Args:
        prepared: The corpus.
        size: Number of tokens of a sample.
        omitted: Number of tokens at the beginning that are not targets.
        full: Splits whose last sample is omitted if it is incomplete.
    """
    print(
        f"{prepared.folder}\n{'split':12}{'documents':>12}{'tokens':>14}{'bytes':>14}{'bytes/token':>13}{'blocks':>10}"
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
    perplexity = prepared.info["splits"]["validation"]["unigram_perplexity"]
    print(f"vocabulary {len(prepared.tokenizer):,}, unigram perplexity of the validation split {perplexity:.1f}")
