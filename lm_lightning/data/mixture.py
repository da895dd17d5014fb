"""Mixtures: several corpora, each with its share of the training samples, which may change in stages.

These are the options; `mixed_samples.py` has the samples.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np

from lm_lightning.data.corpus import Corpus
from lm_lightning.data.interleaving import whole_numbers
from lm_lightning.data.shards import Prepared, Split
from lm_lightning.errors import UserError

NAME = re.compile(r"[A-Za-z0-9][\w-]{0,49}")  # names of corpora are parts of the names of metrics


@dataclass
class MixedCorpus(Corpus):
    """A corpus of a mixture: the options of a corpus, and its weight.

    Args:
        weight: Its weight in training; the share of the samples is the weight divided by the sum of the weights. With
            weight 0, it is only evaluated. Default: the share depends on its size, see `temperature`.
    """

    weight: Optional[float] = None

    def without_weight(self, name: str) -> Corpus:
        """The corpus alone, with the names of its options in the mixture for messages."""
        corpus = Corpus(**{option.name: getattr(self, option.name) for option in fields(Corpus)})
        corpus.prefix = f"--data.corpora.{name}"
        return corpus


@dataclass
class MixtureStage:
    """Shares of the corpora of a mixture from a point of the training on, until the next stage.

    Args:
        start: The first step of the stage: the number of optimizer steps before it, such as 500, or a fraction of the
            training below 1, such as 0.5.
        weights: The weights of the corpora by their names; corpora without a name here have weight 0.
        temperature: As for the mixture, instead of weights.
    """

    start: int | float
    weights: dict[str, float] = field(default_factory=dict)
    temperature: Optional[float] = None


class Mixture:
    """The options of a mixture.

    Args:
        corpora: The corpora by their names.
        temperature: See `PretrainingData`.
        stages: See `PretrainingData`.
    """

    def __init__(
        self, corpora: Mapping[str, MixedCorpus], temperature: Optional[float], stages: Sequence[MixtureStage]
    ) -> None:
        self.names = sorted(corpora)  # so that their order in a config does not matter
        self.corpora = {name: corpora[name].without_weight(name) for name in self.names}
        weights = {name: corpora[name].weight for name in self.names}
        self.stages = list(stages)
        self.check(weights, temperature)
        if not stages or stages[0].start > 0:
            given = {name: weight for name, weight in weights.items() if weight is not None}
            first = MixtureStage(0, given, None if given else 1.0 if temperature is None else temperature)
            self.stages.insert(0, first)

    def check(self, weights: Mapping[str, Optional[float]], temperature: Optional[float]) -> None:
        """Refuses options that contradict each other.

        Raises:
            UserError: Names the option.
        """
        for name in self.names:
            if not NAME.fullmatch(name):
                raise UserError(
                    f"data.corpora has the name {name!r:.60}, but names of corpora must be letters, digits, _ and -"
                )
        without = [name for name, weight in weights.items() if weight is None]
        given = {name: weight for name, weight in weights.items() if weight is not None}
        if given and without:
            raise UserError(
                f"data.corpora.{next(iter(given))} has a weight, but data.corpora.{without[0]} has none: give all "
                "corpora a weight, or none"
            )
        if given and temperature is not None:
            raise UserError("data.corpora has weights, and data.temperature is given: omit one of them")
        if self.stages and self.stages[0].start == 0 and (given or temperature is not None):
            what = "data.temperature" if temperature is not None else "the weights of data.corpora"
            raise UserError(f"data.stages begins with step 0, so {what} would have no effect: omit one of them")
        check_weights("data.corpora", given)
        check_temperature("data.temperature", temperature)
        for number, stage in enumerate(self.stages):
            where = f"data.stages.{number}"
            if unknown := [name for name in stage.weights if name not in self.names]:
                raise UserError(f"{where} has a weight for {unknown[0]!r:.60}, but the corpora are {self.listed()}")
            if bool(stage.weights) == (stage.temperature is not None):
                raise UserError(f"{where} needs weights or a temperature, and not both")
            if stage.start < 0 or (isinstance(stage.start, float) and not stage.start < 1):
                raise UserError(
                    f"{where}.start is {stage.start}, but must be a number of optimizer steps, such as 500, or a "
                    "fraction of the training below 1, such as 0.5"
                )
            check_weights(where, stage.weights)
            check_temperature(f"{where}.temperature", stage.temperature)
        for one, other in zip(self.stages, self.stages[1:]):
            if isinstance(one.start, float) == isinstance(other.start, float) and one.start >= other.start:
                raise not_sorted(one.start, other.start)

    def listed(self) -> str:
        """The names of the corpora, for messages."""
        return ", ".join(self.names)

    def counts(self, stage: MixtureStage, tokens: Mapping[str, int]) -> tuple[int, ...]:
        """The shares of a stage as whole numbers, in the order of `names`.

        Args:
            stage: The stage.
            tokens: Number of training tokens of each corpus.
        """
        if stage.temperature is None:
            return whole_numbers([stage.weights.get(name, 0) for name in self.names])
        if not any(tokens.values()):  # as in an evaluation, whose corpora may have no training split
            return (1,) * len(self.names)
        return whole_numbers([tokens[name] ** (1 / stage.temperature) for name in self.names])

    def shares(self, stage: MixtureStage, tokens: Mapping[str, int]) -> dict[str, float]:
        """The share of each corpus in a stage."""
        counts = self.counts(stage, tokens)
        return {name: count / sum(counts) for name, count in zip(self.names, counts, strict=True)}

    def describe(self, tokens: Mapping[str, int]) -> list[str]:
        """The shares in each stage, a line for each."""
        lines = []
        for stage in self.stages:
            fraction = isinstance(stage.start, float)
            start = f"{stage.start * 100:g} % of the training" if fraction else f"step {stage.start}"
            lines.append(f"from {start}: {in_words(self.shares(stage, tokens))}")
        return lines

    def used(self, split: str) -> list[str]:
        """The names of the corpora that have samples in a split."""
        if split == "train":
            return [
                name
                for name in self.names
                if any(stage.temperature is not None or stage.weights.get(name) for stage in self.stages)
            ]
        return [
            name
            for name, corpus in self.corpora.items()
            if getattr(corpus, f"{split}_fraction") or getattr(corpus, f"{split}_paths")
        ]

    def starts(self, steps: Optional[int]) -> list[int]:
        """The number of optimizer steps before each stage.

        Args:
            steps: Number of steps of the training; None if it has no end.

        Raises:
            UserError: If it is unknown, or the stages are not in order.
        """
        starts: list[int] = []
        for stage in self.stages:
            if isinstance(stage.start, float) and stage.start > 0 and steps is None:
                raise UserError(
                    f"a stage starts after the fraction {stage.start} of the training, which has no end: give the "
                    "number of steps, or trainer.max_steps"
                )
            start = round(stage.start * (steps or 0)) if isinstance(stage.start, float) else stage.start
            if starts and start < starts[-1]:  # they may be equal in a short run, in which the last of them counts
                raise not_sorted(starts[-1], start)
            starts.append(start)
        return starts


def in_words(shares: Mapping[str, float]) -> str:
    """Shares as text, such as "code 30.0 %, novels 70.0 %"."""
    return ", ".join(f"{name} {share:.1%}".replace("%", " %") for name, share in shares.items())


def mixture_options(
    corpus: Corpus,
    corpora: Optional[Mapping[str, MixedCorpus]],
    temperature: Optional[float],
    stages: Sequence[MixtureStage],
) -> Optional[Mixture]:
    """The mixture of these options of `PretrainingData`; None if there is a single corpus.

    Raises:
        UserError: If the options contradict each other.
    """
    if corpora is None:
        if temperature is not None or stages:
            raise UserError("data.temperature and data.stages are for a mixture: give data.corpora, or omit them")
        return None
    if not corpora:
        raise UserError("data.corpora has no corpora: give at least one, such as {novels: {paths: novels}}")
    if corpus != Corpus():
        raise UserError(
            "data.corpus and data.corpora are both given: omit one of them (--data.corpora null --data.temperature "
            "null --data.stages '[]' omits the mixture of a config)"
        )
    return Mixture(corpora, temperature, stages)


def not_sorted(one: float, other: float) -> UserError:
    """The error for stages that are not in order."""
    return UserError(f"data.stages has a stage that starts at {one} before one at {other}: sort them by their start")


def check_weights(where: str, weights: Mapping[str, float]) -> None:
    """Refuses weights that are negative, not finite or all 0; none at all are allowed."""
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"{where}: the weight of {name} is {weight}, but must be 0 or more")
    if weights and not sum(weights.values()):
        raise UserError(f"{where}: all weights are 0: give at least one corpus a positive weight")


def check_temperature(option: str, temperature: Optional[float]) -> None:
    """Refuses a temperature at which the power of a number of tokens could overflow; none is allowed."""
    if temperature is not None and not (math.isfinite(temperature) and temperature >= 0.1):
        raise UserError(f"{option} is {temperature}, but must be 0.1 or more")


class TokenCount(int):
    """A number of tokens as a sized collection, without the tokens, which are in several files."""

    def __len__(self) -> int:
        return int(self)


class JoinedSize(NamedTuple):
    """The size of a split over all corpora, see `contract.SplitSize`."""

    tokens: TokenCount
    bytes: int


class PreparedMixture(NamedTuple):
    """The tokenized corpora of a mixture, see `shards.Prepared`."""

    parts: Mapping[str, Prepared]
    mixture: Mixture

    @property
    def folder(self) -> Path:
        """A path whose name identifies all folders, for messages and comparisons only."""
        return Path(", ".join(f"{name}: {part.folder.name}" for name, part in self.parts.items()))

    @property
    def info(self) -> dict:
        """The description of the corpora, JSON-serializable."""
        tokens = train_tokens(self.parts)
        shares = [self.mixture.shares(stage, tokens) for stage in self.mixture.stages]
        stages = [{"start": stage.start, "shares": own} for stage, own in zip(self.mixture.stages, shares)]
        return {"corpora": {name: part.info for name, part in self.parts.items()}, "stages": stages}

    def frequencies(self) -> np.ndarray:
        """The expected number of occurrences of each token in the first stage, for as many tokens as the corpora have:
        (vocabulary,) float64."""
        tokens = train_tokens(self.parts)
        shares = self.mixture.shares(self.mixture.stages[0], tokens)
        counts = [share * self.parts[name].frequencies() / max(1, tokens[name]) for name, share in shares.items()]
        return np.sum(counts, axis=0) * sum(tokens.values())


def train_tokens(parts: Mapping[str, Prepared]) -> dict[str, int]:
    """The number of training tokens of each corpus."""
    return {name: part.info["splits"]["train"]["tokens"] for name, part in parts.items()}


def joined_size(splits: Sequence[Split]) -> JoinedSize:
    """The size of a split of all corpora; the first token of each is not a target."""
    targets = sum(max(0, len(split.tokens) - 1) for split in splits)
    return JoinedSize(TokenCount(targets + 1), sum(split.bytes for split in splits))


def labelled(split: str, corpus: str) -> str:
    """The name of a split of a corpus, for messages; a single corpus has no name."""
    return f"{split} ({corpus})" if corpus else split
