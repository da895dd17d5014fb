"""Distillation: trains a network with the data and with the predictions of another network, its teacher."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lm_lightning.compression.distilling import Distiller
from lm_lightning.errors import UserError
from lm_lightning.models.module import LanguageModule
from lm_lightning.strategies.capabilities import capabilities


class Distillation(Callback):
    """Trains a network to match its teacher, such as a compressed network to match its original.

    The training loss becomes (1 - weight) * (loss of the model) + weight * T^2 * KL(teacher || student) (Hinton et al.,
    2015, arXiv:1503.02531), summed over the same targets; the loss in evaluations does not change. For multilabel
    classification, the divergence is the mean over the labels; for regression, it is the squared difference, without a
    temperature. `train/distillation` is the mean divergence, `train/loss` the mean of the total.

    The model must define `distillation_loss`, see `LanguageModule`.

    Args:
        teacher: Run folder, `from_pretrained` folder or Hub name of a model with the same tokenizer and labels as this
            run's data. Each process loads it completely, in float32; it is not saved in checkpoints.
        weight: Weight of the distillation loss, from 0 to 1.
        temperature: Divisor of the logits of both; a higher temperature gives unlikely tokens or labels more weight.
    """

    def __init__(self, teacher: str, weight: float = 0.5, temperature: float = 2.0) -> None:
        if not 0 <= weight <= 1:
            raise UserError(f"the distillation's weight is {weight}, but must be between 0 and 1")
        if not 0 < temperature < float("inf"):
            raise UserError(f"the distillation's temperature is {temperature}, but must be a number above 0")
        self.name, self.distiller = teacher, Distiller(weight, temperature)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if type(pl_module).distillation_loss is LanguageModule.distillation_loss:
            pl_module.distillation_loss({}, None, self.distiller)  # raises the error
        if capabilities(trainer.strategy).splits_matrices:
            raise UserError("distillation needs the full head in each process: use --trainer.strategy fsdp2 or ddp")
        self.load(trainer, pl_module)
        self.distance: Any = 0.0  # distillation loss of the current optimizer step, summed over targets
        pl_module.training_loss = partial(self.loss, pl_module)

    def load(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Creates the teacher, a model of the same task.

        Raises:
            UserError: If the teacher has other labels than the data, or was not trained for the task.
        """
        self.teacher: Any = type(pl_module)(pretrained=self.name, attn_implementation=pl_module.attn_implementation)
        self.teacher.trainer = trainer
        labels = self.teacher.own_labels()
        if "id2label" in self.teacher.head_settings() and labels and labels != trainer.datamodule.labels:
            raise UserError(
                f"the teacher {self.name} predicts the labels {', '.join(labels[:20])}, but the data has "
                f"{', '.join(trainer.datamodule.labels[:20])}: use a teacher with the same labels in the same order"
            )
        self.teacher.network = self.teacher.pretrained_network()
        if self.teacher.new_tensors:
            raise UserError(
                f"the teacher {self.name} has no weights for {', '.join(self.teacher.new_tensors[:5])}: use a teacher "
                "that was trained for this task"
            )
        self.teacher.network_made()
        self.teacher.eval().requires_grad_(False).to(trainer.strategy.root_device)
        network = self.teacher.network
        pl_module.print(f"teacher: {type(network).__name__}, {network.num_parameters():,} parameters")

    def loss(self, student: LanguageModule, batch: dict) -> tuple[Tensor, Tensor]:
        """The loss of a training batch, summed over targets, and the number of targets."""
        loss, count, distillation = student.distillation_loss(batch, self.teacher, self.distiller)
        self.distance = self.distance + distillation.detach()
        return loss, count

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        totals = torch.stack([self.distance, pl_module.optimizer_steps.current.tokens.float()])
        totals = trainer.strategy.reduce(totals, reduce_op="sum")
        pl_module.log("train/distillation", totals[0] / totals[1].where(totals[1] > 0, 1))
        self.distance = 0.0

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if pl_module.training_loss is not None:
            pl_module.training_loss = None
            del self.teacher
