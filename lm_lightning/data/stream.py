"""Streams: batches of the samples of splits for each process, and the position from which a run resumes."""

import signal
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Sampler

from lm_lightning.data import contract
from lm_lightning.data.order import SequentialBatches, StreamSampler
from lm_lightning.errors import UserError


class StreamData(LightningDataModule):
    """Base class of all data modules. A subclass defines the samples of a split (`samples`) and how they are batched.

    A subclass sets `batch_size`, `num_workers` and, in `setup`, `seed`.
    """

    length_option = "block_size"  # name of the option that sets the maximum length of a sample
    batch_size: int
    num_workers: int
    seed: int
    collate: Callable[[list[dict]], dict]

    def __init__(self) -> None:
        super().__init__()
        self.overfit_samples = 0  # first samples of the stream that each epoch repeats; 0: none
        self.consumed = 0  # samples of the stream that finished optimizer steps have used, over all replicas

    def samples(self, split: str) -> Any:
        """The samples of a split, a map-style dataset with a length. Index `PADDING` gives a sample without targets.

        Samples of `train` are indexed by their positions in the endless stream of epochs.
        """
        raise NotImplementedError

    @property
    def info(self) -> dict:
        """Origin and number of the samples, JSON-serializable, for `data.json` of the run folder."""
        raise NotImplementedError

    def identity(self) -> dict:
        """Settings that determine the stream of samples; a position in it can be resumed only if they are equal."""
        raise NotImplementedError

    @property
    def replicas(self) -> int:
        """Number of micro-batches processed at once; a strategy may assign the same one to several processes."""
        return self.place["num_replicas"]

    @property
    def replica(self) -> int:
        """Index of this process's micro-batch."""
        return self.place["rank"]

    @property
    def place(self) -> dict[str, int]:
        """`num_replicas` and `rank` of this process, in the form that Lightning's strategies pass to samplers."""
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
            self.overfit_samples = max(1, batches) * self.batch_size * self.replicas
            sampler.consumed = lambda: self.consumed % self.overfit_samples
        return self.loader(samples, sampler)

    def advance(self, rows: int) -> None:
        """Called after each optimizer step, for which this replica has used a number of samples."""
        self.consumed += rows * self.replicas

    def val_dataloader(self) -> DataLoader:
        return self.evaluation_loader("validation")

    def test_dataloader(self) -> DataLoader:
        return self.evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader:
        return self.evaluation_loader("test")

    def evaluation_loader(self, split: str) -> DataLoader:
        samples = self.samples(split)
        return self.loader(samples, SequentialBatches(len(samples), self.batch_size, self.replica, self.replicas))

    def loader(self, samples: Any, sampler: Sampler[list[Any]]) -> DataLoader:
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
            return  # the weights of a checkpoint may be evaluated on any data
        for name, value in self.identity().items():
            if state["identity"].get(name) != value:
                raise UserError(
                    f"the checkpoint was made with {name} {state['identity'].get(name)}, but this run has {value}, so "
                    "its position in the data cannot be resumed: use the old value, or start a new run from the "
                    "weights with --model.pretrained RUN/model"
                )
        self.consumed = state["consumed"]


def ignore_interrupts(worker: int) -> None:
    """Makes a worker ignore Ctrl-C, as its parent still needs it to finish the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
