"""Streams: the samples of splits in, batches for each process out, and the place to go on from."""

import signal
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lm_lightning.data import contract
from lm_lightning.data.order import SequentialBatches, StreamSampler
from lm_lightning.errors import UserError


class StreamData(LightningDataModule):
    """Base of all data: a subclass says what the samples of a split are (`samples`) and how they become a batch.

    A subclass sets `batch_size`, `num_workers` and, in `setup`, `seed`.
    """

    length_option = "block_size"  # the name of the option that says how long a sample may be
    batch_size: int
    num_workers: int
    seed: int
    collate: Callable[[list[dict]], dict]

    def __init__(self) -> None:
        super().__init__()
        self.consumed = 0  # samples of the stream that finished optimizer steps have used, over all replicas

    def samples(self, split: str) -> Any:
        """The samples of a split, a map-style dataset with a length, of which `PADDING` gives one that does not count.

        Those of `train` are asked for by their positions in the endless stream of epochs.
        """
        raise NotImplementedError

    @property
    def info(self) -> dict:
        """Where the samples came from and how many there are, JSON-able, for `data.json` of the run folder."""
        raise NotImplementedError

    def identity(self) -> dict:
        """What decides the stream of samples: a checkpoint's position in it has a meaning only if these are equal."""
        raise NotImplementedError

    @property
    def replicas(self) -> int:
        """How many different micro-batches are worked on at once; a strategy may give one to several processes."""
        return self.place["num_replicas"]

    @property
    def replica(self) -> int:
        """Which of them is this process's."""
        return self.place["rank"]

    @property
    def place(self) -> dict[str, int]:
        """Of this process among the replicas, as Lightning's strategies tell it to samplers."""
        return contract.place(self.trainer)

    def train_dataloader(self) -> DataLoader:
        samples = self.samples("train")
        sampler = StreamSampler(
            len(samples),
            self.batch_size,
            self.trainer.accumulate_grad_batches,
            self.replica,
            self.replicas,
            lambda: self.consumed,
        )
        if overfit := self.trainer.overfit_batches:  # each epoch reads the first batches again
            batches = min(overfit, len(sampler)) if isinstance(overfit, int) else int(overfit * len(sampler))
            again = max(1, batches) * self.batch_size * self.replicas
            sampler.consumed = lambda: self.consumed % again
        return self.loader(samples, sampler)

    def val_dataloader(self) -> DataLoader:
        return self.evaluation_loader("validation")

    def test_dataloader(self) -> DataLoader:
        return self.evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader:
        return self.evaluation_loader("test")

    def evaluation_loader(self, split: str) -> DataLoader:
        samples = self.samples(split)
        return self.loader(samples, SequentialBatches(len(samples), self.batch_size, self.replica, self.replicas))

    def loader(self, samples: Any, sampler: StreamSampler | SequentialBatches) -> DataLoader:
        return DataLoader(
            samples,
            batch_sampler=sampler,
            collate_fn=self.collate,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=ignore_interrupts,
        )

    def state_dict(self) -> dict:
        return {"consumed": self.consumed, "identity": self.identity()}

    def load_state_dict(self, state: dict) -> None:
        if self.trainer.state.fn != "fit":
            return  # a checkpoint's weights may be measured on any data
        for name, value in self.identity().items():
            if state["identity"].get(name) != value:
                raise UserError(
                    f"the checkpoint was made with {name} {state['identity'].get(name)}, this run has {value}, so its "
                    "position in the data has no meaning here: take the old value, or start a new run from the "
                    "weights with --model.pretrained RUN/model"
                )
        self.consumed = state["consumed"]


def ignore_interrupts(worker: int) -> None:
    """Has Ctrl-C pass by a worker, which its parent still needs to finish the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
