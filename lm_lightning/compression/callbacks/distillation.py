"""Distillation: a network learns from the data and from what another one, its teacher, says of the same batches."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lm_lightning.errors import UserError
from lm_lightning.losses import Teacher, kd_loss, linear_distillation
from lm_lightning.models.gpt import CausalLM
from lm_lightning.models.module import LanguageModule
from lm_lightning.strategies import TensorParallel
from lm_lightning.tasks.classification.model import Classification
from lm_lightning.tasks.masked_lm.model import MaskedLM, cross_entropy, prediction_logits
from lm_lightning.tasks.questions.model import QuestionAnswering
from lm_lightning.tasks.tagging.model import Tagging

Losses = tuple[Tensor, Tensor, Tensor]  # the loss of a batch, how many targets that is of, and the divergence in it


class Distillation(Callback):
    """Has a network come nearer to its teacher, such as a compressed one to that which it was made of.

    The loss of a training step becomes (1 - weight) * its own + weight * T^2 * KL(teacher || student) (Hinton et al.,
    2015, arXiv:1503.02531), summed over the same targets; that of an evaluation stays what it is. Of several labels,
    the divergence is the mean over these; of numbers, it is the squared difference, which knows no temperature.
    `train/distillation` is the mean of what the weight multiplies, `train/loss` that of the whole.

    Args:
        teacher: Run folder, or folder or Hub name of weights, with the tokenizer and labels of this run's data. Each
            process has all of it, in float32; no checkpoint has any of it.
        weight: Share of the teacher in the loss.
        temperature: By which the logits of both are divided; a higher one tells more of what is unlikely.
    """

    def __init__(self, teacher: str, weight: float = 0.5, temperature: float = 2.0) -> None:
        if not 0 <= weight <= 1:
            raise UserError(f"the distillation's weight is {weight}, but must be between 0 and 1")
        if not 0 < temperature < float("inf"):
            raise UserError(f"the distillation's temperature is {temperature}, but must be a number above 0")
        self.name, self.weight, self.temperature = teacher, weight, temperature
        self.losses: dict[type, Callable[[Any, dict], Losses]] = {
            CausalLM: self.of_text,
            MaskedLM: self.of_masks,
            Classification: self.of_rows,
            Tagging: self.of_words,
            QuestionAnswering: self.of_answers,
        }

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        losses = next((losses for kind, losses in self.losses.items() if isinstance(pl_module, kind)), None)
        if losses is None:
            known = ", ".join(kind.__name__ for kind in self.losses)
            raise UserError(
                f"what a {type(pl_module).__name__} says cannot be compared with a teacher: leave Distillation out, "
                f"which is for {known}"
            )
        if isinstance(trainer.strategy, TensorParallel):
            raise UserError("distillation needs a whole head in each process: take --trainer.strategy fsdp2 or ddp")
        self.load(trainer, pl_module)
        self.distance: Any = 0.0  # of the optimizer step in progress
        own = pl_module.loss
        pl_module.loss = partial(self.loss, pl_module, losses, own)

    def load(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the teacher, a model of the same task.

        Raises:
            UserError: If it cannot tell what the data asks for.
        """
        self.teacher: Any = type(pl_module)(pretrained=self.name, attention=pl_module.attention)
        self.teacher.trainer = trainer
        labels = self.teacher.own_labels()
        if "id2label" in self.teacher.head_settings() and labels and labels != trainer.datamodule.labels:
            raise UserError(
                f"the teacher {self.name} tells the labels {', '.join(labels[:20])}, and the data has "
                f"{', '.join(trainer.datamodule.labels[:20])}: take a teacher with the same ones in the same order"
            )
        self.teacher.network = self.teacher.pretrained_network()
        if self.teacher.new_tensors:
            raise UserError(
                f"the teacher {self.name} does not know {', '.join(self.teacher.new_tensors[:5])}: take one that was "
                "trained for this task"
            )
        self.teacher.network_made()
        self.teacher.eval().requires_grad_(False).to(trainer.strategy.root_device)
        network = self.teacher.network
        pl_module.print(f"teacher: {type(network).__name__}, {network.num_parameters():,} parameters")

    def loss(
        self,
        student: LanguageModule,
        losses: Callable[[Any, dict], Losses],
        own: Callable[[dict], tuple[Tensor, Tensor]],
        batch: dict,
    ) -> tuple[Tensor, Tensor]:
        """What takes the place of the model's own loss."""
        if not student.training:
            return own(batch)
        loss, count, distance = losses(student, batch)
        self.distance = self.distance + distance.detach()
        return loss, count

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        totals = torch.stack([self.distance, pl_module.steps.current.tokens.float()])
        totals = trainer.strategy.reduce(totals, reduce_op="sum")
        pl_module.log("train/distillation", totals[0] / totals[1].where(totals[1] > 0, 1))
        self.distance = 0.0

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if "loss" in vars(pl_module):
            del pl_module.loss, self.teacher

    # Losses

    @torch.no_grad()
    def told(self, method: str, batch: dict) -> Any:
        """What a method of the teacher says of a batch."""
        return getattr(self.teacher, method)(batch)

    def mixed(self, own: Tensor, distance: Tensor) -> Tensor:
        """The loss that is made of both."""
        return (1 - self.weight) * own + self.weight * distance

    def of_tokens(
        self, student: LanguageModule, output: Tensor, told: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss and divergence of N tokens, from what goes into the heads, (N, H), or the logits, (N, V)."""
        head, other = student.network.get_output_embeddings(), self.teacher.network.get_output_embeddings()
        if student.has_linear_head and self.teacher.has_linear_head:
            teacher = Teacher(told, other.weight, other.bias, self.weight, self.temperature)
            return linear_distillation(output, head.weight, head.bias, targets, teacher, student.vocab_size)
        logits = head(output) if student.has_linear_head else output
        with torch.no_grad():
            told = other(told) if self.teacher.has_linear_head else told
        rows = min(student.vocab_size, self.teacher.vocab_size)
        apart = kd_loss(logits[:, :rows], told[:, :rows], self.temperature)
        distance = apart.masked_fill(targets == -100, 0).sum()
        return self.mixed(cross_entropy(logits[:, : student.vocab_size], targets), distance), distance

    def of_text(self, student: CausalLM, batch: dict) -> Losses:
        output, told, targets = student.outputs(batch), self.told("outputs", batch), batch["targets"].flatten()
        loss, distance = self.of_tokens(student, output.flatten(0, 1), told.flatten(0, 1), targets)
        return loss, (targets != -100).sum(), distance

    def of_masks(self, student: MaskedLM, batch: dict) -> Losses:
        output, told, targets = student.outputs(batch), self.told("outputs", batch), batch["targets"].flatten()
        own, other = (prediction_logits(both).flatten(0, 1) for both in (output, told))
        loss, distance = self.of_tokens(student, own, other, targets)
        if "next_sentence" in batch:  # weighs as in the model's own loss
            labels, size = batch["next_sentence"], batch["targets"].shape[1]
            logits = output.seq_relationship_logits
            apart = kd_loss(logits, told.seq_relationship_logits, self.temperature)
            apart = apart.masked_fill(labels == -100, 0).sum()
            loss = loss + self.mixed(cross_entropy(logits, labels), apart) * size
            distance = distance + apart * size
        return loss, (targets != -100).sum(), distance

    def of_rows(self, student: Classification, batch: dict) -> Losses:
        logits, told, targets = student.logits(batch), self.told("logits", batch), batch["targets"]
        own, count = student.losses(logits, targets)
        kind = student.trainer.datamodule.kind
        if kind == "regression":
            apart, missing = (logits - told).squeeze(-1).square(), targets.isnan()
        elif kind == "multilabel":  # each label, and that it is none: two logits, of which one is 0
            two, told_two = (F.pad(both.unsqueeze(-1), (1, 0)) for both in (logits, told))
            apart, missing = kd_loss(two, told_two, self.temperature).mean(1), targets[:, 0].isnan()
        else:
            apart, missing = kd_loss(logits, told, self.temperature), targets == -100
            if student.weights is not None:
                apart = apart * student.weights[targets.clamp(min=0)]
        distance = apart.masked_fill(missing, 0).sum()
        return self.mixed(own, distance), count, distance

    def of_words(self, student: Tagging, batch: dict) -> Losses:
        logits, told = student.logits(batch), self.told("logits", batch)
        own, count = student.losses(logits, batch)
        missing = (batch["targets"] == -100) | (batch["words"] < 0)
        distance = kd_loss(logits, told, self.temperature).masked_fill(missing, 0).sum()
        return self.mixed(own, distance), count, distance

    def of_answers(self, student: QuestionAnswering, batch: dict) -> Losses:
        logits, told = student.logits(batch), self.told("logits", batch)
        own, count = student.losses(logits, batch)
        logits, told = student.of_places(logits, batch), student.of_places(told, batch)
        apart = kd_loss(logits, told, self.temperature).mean(0)
        distance = apart.masked_fill(batch["targets"][:, 0] == -100, 0).sum()
        return self.mixed(own, distance), count, distance
