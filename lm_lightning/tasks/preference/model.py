"""Preference tuning: trains a causal language model to prefer the better one of two answers."""

from typing import Any, NamedTuple, Optional

import torch
import transformers
from torch import Tensor, nn

from lm_lightning.data.order import PADDING
from lm_lightning.errors import UserError
from lm_lightning.models.gpt import CausalLM
from lm_lightning.models.metrics import Mode, Ratio
from lm_lightning.models.module import LanguageModule
from lm_lightning.networks import headless
from lm_lightning.tasks.preference import reference as references
from lm_lightning.tasks.preference.log_probs import linear_log_probs
from lm_lightning.tasks.preference.objectives import DPO, Answers, Objective
from lm_lightning.tasks.preference.reference import PreferenceFiles

MODES: dict[str, Optional[Mode]] = {
    "loss": "min",
    "accuracy": "max",
    "margin": "max",
    "reward_chosen": None,
    "reward_rejected": None,
    "log_prob_chosen": None,
    "log_prob_rejected": None,
}


class Scores(NamedTuple):
    """The results of a batch, (B,) float32 each; of rows that only pad it, they mean nothing.

    Attributes:
        loss: The loss of each pair.
        accuracy: 1 if the better answer has the larger reward, else 0.
        margin: How much larger its reward is.
        reward_chosen: The reward of the better answer.
        reward_rejected: That of the worse answer.
        log_prob_chosen: Sum of the log-probabilities of the better answer's tokens, in nats.
        log_prob_rejected: That of the worse answer's.
    """

    loss: Tensor
    accuracy: Tensor
    margin: Tensor
    reward_chosen: Tensor
    reward_rejected: Tensor
    log_prob_chosen: Tensor
    log_prob_rejected: Tensor


class PreferenceTuning(CausalLM):
    """Any causal network of `transformers`, trained on pairs of a better and a worse answer.

    Args:
        objective: The loss: `DPO`, `SimPO` or `ORPO`, or a subclass of `Objective` of your own. Default: `DPO`.
        reference: Folder, run or Hub name of the network with which DPO compares the answers. Default: the network
            before training; if it was an adapter that was trained, its base.
        dropout: Whether the network's own dropout is used in training. Without it, as by default, the answers of a pair
            are compared by the same network.
        options: Options of all models, see `LanguageModule`.
    """

    def __init__(
        self,
        objective: Optional[Objective] = None,
        reference: Optional[str] = None,
        dropout: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.objective: Objective = objective or DPO()
        self.reference_name, self.use_dropout = reference, dropout
        self.averages: Any = nn.ModuleDict({name: Ratio() for name in MODES if name != "loss"})
        self.references: dict[str, Tensor] = {}  # by split: log-probabilities of each row's answers, (rows, 2)
        self.reference_network: tuple[transformers.PreTrainedModel, ...] = ()  # (no submodule)
        self.training_sums: Optional[Tensor] = None  # of the step in progress: of each metric, and of pairs

    # Network

    def new_network(self) -> transformers.PreTrainedModel:
        return self.without_dropout(super().new_network())

    def pretrained_network(self) -> transformers.PreTrainedModel:
        return self.without_dropout(super().pretrained_network())

    def without_dropout(self, network: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
        """Sets the dropout probabilities of a network to 0, unless its dropout is used; an adapter keeps its own."""
        for module in () if self.use_dropout else network.modules():
            layer = isinstance(module, nn.Dropout)
            for name, value in list(vars(module).items()):
                if isinstance(value, float) and ("drop" in name or (layer and name == "p")):
                    setattr(module, name, 0.0)
        return network

    def network_made(self) -> None:
        super().network_made()
        if not self.objective.needs_reference:
            if self.reference_name is not None:
                raise UserError(f"{type(self.objective).__name__} needs no model.reference: omit it")
            return
        if self.uses_base and self.new_tensors:
            raise UserError(
                f"{self.pretrained} has no weights for {', '.join(self.new_tensors[:5])}, so its base cannot be the "
                f"reference: {references.REMEDY}"
            )
        if self.trainer.state.fn != "fit" and not self.uses_base:
            name, own = self.evaluated_reference() or "", self.pretrained
            if self.evaluated_network is not None or name != own:  # else the network is its own reference
                self.reference_network = (references.load(self, name),)

    @property
    def uses_base(self) -> bool:
        """Whether the reference is the base of an adapter."""
        return self.adapter is not None and self.reference_name is None

    def evaluated_reference(self) -> Optional[str]:
        """The reference in an evaluation."""
        if self.reference_name is not None or self.pretrained is None:
            return self.reference_name
        if self.evaluated_network is not None:
            return self.pretrained
        named = references.named_in(self.pretrained_folder())
        return self.pretrained if named is None else named

    def extra_files(self) -> Optional[PreferenceFiles]:
        if not self.objective.needs_reference:
            return None
        if self.trainer.state.fn == "fit":
            return PreferenceFiles(self.reference_of_training())
        return PreferenceFiles(references.absolute(self.evaluated_reference() or ""))

    def reference_of_training(self) -> str:
        """The folder or Hub name of the reference; empty if it is a new network."""
        name = self.reference_name or (self.pretrained and self.pretrained_folder()) or ""
        return references.absolute(name)

    # Reference

    def on_fit_start(self) -> None:
        """Computes the log-probabilities of the reference, unless they are in the checkpoint that is resumed."""
        if self.objective.needs_reference and not self.uses_base and self.trainer.ckpt_path is None:
            network = None if self.reference_name is None else references.load(self, self.reference_name)
            self.references = {split: references.compute(self, split, network) for split in ("train", "validation")}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.references:
            keys = self.trainer.datamodule.row_keys
            checkpoint["reference"] = {
                split: {"keys": keys(split), "log_probs": values} for split, values in self.references.items()
            }
            checkpoint["reference_name"] = self.reference_of_training()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.trainer.state.fn == "fit" and self.objective.needs_reference and not self.uses_base:
            keys = self.trainer.datamodule.row_keys
            references.refuse_other(checkpoint.get("reference_name"), self.reference_of_training())
            self.references = {
                split: references.saved_values(checkpoint.get("reference"), split, keys(split))
                for split in ("train", "validation")
            }

    @torch.no_grad()
    def reference_log_probs(self, batch: dict, own: Tensor) -> Tensor:
        """The log-probabilities of both answers by the reference, (B, 2) float32.

        Args:
            batch: The batch.
            own: Those by the network itself.
        """
        if self.trainer.state.fn == "fit" and self.references:
            split = "train" if self.trainer.training else "validation"
            return self.references[split][batch["id"]].to(self.device)
        if self.reference_network:
            return self.answer_log_probs(batch, self.reference_network[0])[0]
        if self.adapter is None:  # the pretrained network itself is evaluated
            return own.detach()
        training = self.network.training
        with self.adapter.disabled(self.network.eval()):
            found, _ = self.answer_log_probs(batch)
        self.network.train(training)
        return found

    # Loss

    def answer_log_probs(
        self, batch: dict, network: Optional[transformers.PreTrainedModel] = None
    ) -> tuple[Tensor, Tensor]:
        """The log-probabilities of the answers of a batch, summed over their tokens.

        Args:
            batch: See `loss`.
            network: Default: the network that is trained.

        Returns:
            Log-probabilities of the better and the worse answers, (B, 2) float32; their numbers of tokens, (B, 2)
            int64.
        """
        network = network or self.network
        ids, mask, targets = (batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask", "targets"))
        answered = targets != -100
        linear = self.has_linear_head and type(network) is type(self.network)
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if linear:
            with headless(network):
                hidden = network(**inputs).logits[answered]
            head = network.get_output_embeddings()
            found = linear_log_probs(hidden, head.weight, head.bias, targets[answered], self.vocab_size)
        else:
            logits = network(**inputs).logits[answered][:, : self.vocab_size].float()
            found = -nn.functional.cross_entropy(logits, targets[answered], reduction="none")
        log_probs = found.new_zeros(targets.shape).masked_scatter(answered, found).sum(1)
        return log_probs.view(-1, 2), answered.sum(1).view(-1, 2)

    def scores(self, batch: dict) -> tuple[Scores, Tensor]:
        """The results of a batch, and the number of tokens of the answers, (B, 2) int64."""
        log_probs, tokens = self.answer_log_probs(batch)
        reference: list[Any] = [None, None]
        if self.objective.needs_reference:
            reference = list(self.reference_log_probs(batch, log_probs).unbind(1))
        chosen, rejected = (Answers(log_probs[:, i], tokens[:, i], reference[i]) for i in range(2))
        losses = self.objective.losses(chosen, rejected)
        with torch.no_grad():
            one, other = self.objective.rewards(chosen), self.objective.rewards(rejected)
        found = Scores(losses, (one > other).float(), one - other, one, other, *log_probs.detach().unbind(1))
        return found, tokens

    def loss(self, batch: dict) -> tuple[Tensor, Tensor]:
        """The loss of a batch, summed over pairs, and their number.

        Batches are described at `collate_pairs`.
        """
        scores, tokens = self.scores(batch)
        counts = (tokens > 0).all(1)
        if self.trainer.training:
            sums = torch.stack([(values.detach() * counts).sum() for values in scores[1:]] + [counts.sum()])
            self.training_sums = sums if self.training_sums is None else self.training_sums + sums
        return (scores.loss * counts).sum(), counts.sum()

    def distillation_loss(self, batch: dict, teacher: Any, distiller: Any) -> tuple[Tensor, Tensor, Tensor]:
        return LanguageModule.distillation_loss(self, batch, teacher, distiller)  # refuses

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        assert self.training_sums is not None
        *sums, pairs = self.trainer.strategy.reduce(self.training_sums, reduce_op="sum")
        self.training_sums = None
        self.log_dict({f"train/{name}": total / pairs for name, total in zip(Scores._fields[1:], sums)})

    # Evaluation

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self.check_batch(batch, "evaluation")
        scores, tokens = self.scores(batch)
        counts = (tokens > 0).all(1)
        for name, values in scores._asdict().items():
            average = self.val_loss if name == "loss" else self.averages[name]
            average.update((values * counts).sum(), counts.sum())

    def metric_modes(self) -> dict[str, Optional[Mode]]:
        return dict(MODES)

    def metrics(self, loss: Tensor, split: str) -> dict[str, Tensor]:
        """Adds the means over all pairs of what `Scores` describes."""
        values = {"loss": loss}
        for name, average in self.averages.items():
            values[name] = average.compute()
            average.reset()
        return values

    def predict_step(self, batch: dict, batch_idx: int) -> list[dict]:
        """For each row: its number, `id`, and what `Scores` describes; also `tokens_chosen` and `tokens_rejected`.

        Values of rows whose answers are beyond `data.max_length` are None.
        """
        scores, tokens = self.scores(batch)
        columns = {name: values.tolist() for name, values in scores._asdict().items() if name != "accuracy"}
        columns |= {f"tokens_{name}": tokens[:, i].tolist() for i, name in enumerate(("chosen", "rejected"))}
        rows = []
        for place, (number, counts) in enumerate(zip(batch["id"], (tokens > 0).all(1).tolist())):
            known = counts or number == PADDING
            values = {name: column[place] if known else None for name, column in columns.items()}
            rows.append({"id": number, **values})
        return rows
