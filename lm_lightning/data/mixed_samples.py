"""The order of the samples of a mixture, in training and evaluation.

The stream of a mixture takes the next sample of one of the corpora at each position (`interleaving.py` decides of
which), and each corpus has its own endless stream of shuffled epochs, so that small corpora are repeated and large ones
need not be used up.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Optional

from torch.utils.data import Dataset, Sampler

from lm_lightning.data.contract import place
from lm_lightning.data.interleaving import Interleaving, Stage
from lm_lightning.data.mixture import Mixture, in_words
from lm_lightning.data.order import PADDING


class MixedStream(Dataset):
    """The training samples of a mixture, by their position in the stream.

    Args:
        names: Names of the corpora.
        parts: The samples of each corpus, by their position in its own stream; None for a corpus that is not used.
        first_ids: What is added to the ids of each corpus, so that ids are different.
        interleaving: Decides which sample is at which position.
        block_size: Number of tokens of a sample.
        end: Number of samples after the last step of the run; None if it has no end.

    Items are those of the corpora.
    """

    def __init__(
        self,
        names: Sequence[str],
        parts: Sequence[Optional[Any]],
        first_ids: Sequence[int],
        interleaving: Interleaving,
        block_size: int,
        end: Optional[int],
    ) -> None:
        self.names, self.parts, self.first_ids = names, parts, first_ids
        self.interleaving, self.block_size, self.end = interleaving, block_size, end

    def __len__(self) -> int:
        """The number of samples of all used corpora together, which is what an epoch of a mixture means."""
        return sum(len(part) for part in self.parts if part is not None)

    def __getitem__(self, position: int) -> dict:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[dict]:
        """Several items; those of each corpus are read together, see `Blocks.__getitems__`."""
        places = [self.interleaving.locate(position) for position in positions]
        items: list[dict] = [{}] * len(places)
        for corpus in {corpus for corpus, _ in places}:
            part: Any = self.parts[corpus]
            chosen = [i for i, (other, _) in enumerate(places) if other == corpus]
            own = [places[i][1] for i in chosen]
            read = getattr(part, "__getitems__", lambda own, part=part: [part[place] for place in own])
            for i, item in zip(chosen, read(own)):
                items[i] = item | {"id": item["id"] + self.first_ids[corpus]}
        return items

    def describe(self, position: int) -> str:
        """The share of each corpus in the stage of a position, as text."""
        stage = self.interleaving.stages[self.interleaving.stage(position)]
        return in_words({name: stage.share(corpus) for corpus, name in enumerate(self.names)})

    def seen(self, position: int, repeated: int = 0) -> dict[str, dict[str, float]]:
        """What the samples before a position are: for each corpus, their `tokens`, `epochs` and `share`.

        Args:
            position: The position.
            repeated: Number of the first samples that are repeated all the time, see `trainer.overfit_batches`; 0 if
                the stream is not repeated.
        """
        counts = self.interleaving.counts(position % repeated if repeated else position)
        if repeated:
            more = self.interleaving.counts(repeated)
            counts = [count + position // repeated * each for count, each in zip(counts, more, strict=True)]
        return {
            name: {
                "tokens": count * self.block_size,
                "epochs": count / len(part) if part is not None else 0.0,
                "share": count / max(1, position),
            }
            for name, part, count in zip(self.names, self.parts, counts, strict=True)
        }


class MixedEvaluation(Dataset):
    """The samples of a split of a mixture, by corpus and index.

    Args:
        parts: The samples of each corpus, by its name.
        first_ids: What is added to the ids of each corpus, so that ids are different.

    Items are those of the corpora with `corpus`, its name.
    """

    def __init__(self, parts: Mapping[str, Any], first_ids: Mapping[str, int]) -> None:
        self.parts, self.first_ids = parts, first_ids

    def __len__(self) -> int:
        return sum(map(len, self.parts.values()))

    def __getitem__(self, place: tuple[str, int]) -> dict:
        corpus, index = place
        item = self.parts[corpus][index]
        number = PADDING if index == PADDING else item["id"] + self.first_ids[corpus]
        return item | {"id": number, "corpus": corpus}


class MixedBatches(Sampler[list[tuple[str, int]]]):
    """Batch sampler for the evaluation of a mixture: as `SequentialBatches`, but each batch has samples of one corpus.

    The corpora take turns, so that the first batches have samples of all of them.

    Args:
        sizes: Number of samples of each corpus.
        batch_size: Number of samples per batch and rank.
        rank: Rank of this process.
        world_size: Number of processes.
    """

    def __init__(self, sizes: Mapping[str, int], batch_size: int, rank: int, world_size: int) -> None:
        self.sizes, self.batch_size, self.rank, self.world_size = sizes, batch_size, rank, world_size
        batches = {name: -(-size // (batch_size * world_size)) for name, size in sizes.items()}
        order = [(number / count, name, number) for name, count in batches.items() for number in range(count)]
        self.order = [(name, number) for _, name, number in sorted(order)]

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[tuple[str, int]]]:
        for name, number in self.order:
            start = (number * self.world_size + self.rank) * self.batch_size
            size = self.sizes[name]
            yield [(name, i if i < size else PADDING) for i in range(start, start + self.batch_size)]


class Past(NamedTuple):
    """The state of the checkpoint from which a run resumes.

    Attributes:
        consumed: Number of samples that were used.
        step: Number of optimizer steps.
        stages: The stages of the run that made the checkpoint, by positions in the stream.
    """

    consumed: int = 0
    step: int = 0
    stages: Sequence[Stage] = ()


def plan(
    mixture: Mixture, tokens: Mapping[str, int], trainer: Any, batch_size: int, length: int, past: Past
) -> tuple[Interleaving, Optional[int]]:
    """The interleaving of a run, and the number of samples after its last step (None if it has no end).

    The past of a resumed run is not changed by new weights, a new batch size or another number of steps.

    Args:
        mixture: The mixture.
        tokens: Number of training tokens of each corpus.
        trainer: The trainer.
        batch_size: Number of samples per micro-batch and process.
        length: Number of samples in an epoch.
        past: The checkpoint from which the run resumes.
    """
    samples_per_step = batch_size * trainer.accumulate_grad_batches * place(trainer)["num_replicas"]
    steps = training_steps(trainer, -(-length // samples_per_step))

    def position(step: int) -> int:
        return past.consumed + (step - past.step) * samples_per_step

    own = [
        Stage(position(start), mixture.counts(stage, tokens))
        for start, stage in zip(mixture.starts(steps), mixture.stages, strict=True)
    ]
    stages = merged(past.stages, own, past.consumed)
    return Interleaving(stages), None if steps is None else position(steps)


def training_steps(trainer: Any, epoch_steps: int) -> Optional[int]:
    """Number of optimizer steps of a run; None if neither steps nor epochs are limited.

    Args:
        trainer: The trainer.
        epoch_steps: Number of steps in an epoch, without `limit_train_batches`.
    """
    batches, limit = epoch_steps * trainer.accumulate_grad_batches, trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    limits = [trainer.max_steps] if trainer.max_steps > 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        limits.append(trainer.max_epochs * -(-batches // trainer.accumulate_grad_batches))
    return min(limits, default=None)


def merged(past: Sequence[Stage], own: Sequence[Stage], position: int) -> list[Stage]:
    """The stages of a resumed run: those of its past until the position at which it resumes, then its own.

    Args:
        past: The stages of the checkpoint.
        own: The stages of this run; the first one begins at or before `position`.
        position: Number of samples that were used before.
    """
    kept = [stage for stage in past if stage.start < position]
    if not kept:
        return list(own)
    current = [stage for stage in own if stage.start <= position][-1]
    if current.counts != kept[-1].counts:
        kept.append(Stage(position, current.counts))
    return kept + [stage for stage in own if stage.start > position]
