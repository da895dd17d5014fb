"""Dependency parsing: predicts the head of each word, and its relation to it."""

from functools import partial
from pathlib import Path
from typing import Any, Optional

import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from lm_lightning.errors import UserError
from lm_lightning.finetuning import results
from lm_lightning.finetuning.examples import network_inputs
from lm_lightning.finetuning.metrics import Counts
from lm_lightning.finetuning.mistakes import Mistakes, readable, words_of
from lm_lightning.finetuning.words import TRUNCATED
from lm_lightning.models.build import NetworkBuilder
from lm_lightning.models.export import HEAD_FILE
from lm_lightning.models.metrics import Mode, Ratio
from lm_lightning.models.module import LanguageModule
from lm_lightning.tasks.parsing.spanning_tree import spanning_tree

Arc = tuple[str, tuple[int, int]]  # a relation, and the numbers of a word, from 0, and of its head, from 1
ROOT = "root"  # the relation of the root in Universal Dependencies


class Biaffine(nn.Module):
    """Scores all pairs of words as head and dependent (Dozat and Manning, 2017, arXiv:1611.01734).

    Args:
        hidden_size: Hidden size of the network.
        relations: Number of relations.
        arc_size: Size of the vectors from which the scores of arcs are computed.
        relation_size: Size of the vectors from which the scores of relations are computed.
        dropout: Dropout probability of these vectors.
    """

    def __init__(self, hidden_size: int, relations: int, arc_size: int, relation_size: int, dropout: float) -> None:
        super().__init__()
        self.root = nn.Parameter(torch.zeros(hidden_size))
        self.arc_dependent, self.arc_head = nn.Linear(hidden_size, arc_size), nn.Linear(hidden_size, arc_size)
        self.relation_dependent = nn.Linear(hidden_size, relation_size)
        self.relation_head = nn.Linear(hidden_size, relation_size)
        self.arc = nn.Parameter(torch.zeros(arc_size + 1, arc_size))
        self.relation = nn.Parameter(torch.zeros(relations, relation_size + 1, relation_size + 1))
        self.activation = nn.Sequential(nn.GELU(), nn.Dropout(dropout))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores all pairs of words.

        Args:
            states: (B, W, H).

        Returns:
            For each word, the scores of the root and of all words as its head, (B, W, 1 + W); and the inputs of
            `relations`: for each word as a dependent, (B, W, R + 1), and for the root and each word as a head, (B, 1 +
            W, R + 1).
        """
        heads = torch.cat([self.root.to(states.dtype).expand(len(states), 1, -1), states], 1)
        dependent = append_one(self.activation(self.arc_dependent(states)))
        arcs = dependent @ self.arc.to(dependent.dtype) @ self.activation(self.arc_head(heads)).transpose(1, 2)
        dependents = append_one(self.activation(self.relation_dependent(states)))
        return arcs, dependents, append_one(self.activation(self.relation_head(heads)))

    def relations(self, dependents: Tensor, heads: Tensor, arcs: Tensor) -> Tensor:
        """Scores of each word's relations to its head, (B, W, relations); `arcs`, (B, W), has the numbers of heads."""
        chosen = heads.gather(1, arcs.unsqueeze(-1).expand(-1, -1, heads.shape[-1]))
        return torch.einsum("bwi,rij,bwj->bwr", dependents, self.relation.to(dependents.dtype), chosen)


def append_one(states: Tensor) -> Tensor:
    """Appends 1 to each state, so that a product with it has a bias."""
    return F.pad(states, (0, 1), value=1.0)


class Parser(LanguageModule):
    """A network of `transformers` with a biaffine head over the first token of each word.

    The export is a folder for `AutoModel`, with the head in an additional file, head.safetensors.

    Args:
        arc_size: Size of the vectors from which the scores of arcs between words are computed.
        relation_size: Size of the vectors from which the scores of relations are computed.
        dropout: Dropout probability of the vectors from which scores are computed.
        options: Options of all models, see `LanguageModule`.
    """

    auto_class = transformers.AutoModel
    unused = ("pooler.",)

    @staticmethod
    def main_metric(data: Any) -> str:
        return "las"

    def __init__(self, arc_size: int = 400, relation_size: int = 100, dropout: float = 0.33, **options: Any) -> None:
        super().__init__(**options)
        self.arc_size, self.relation_size, self.dropout = arc_size, relation_size, dropout

    # Network

    def own_labels(self) -> list[str]:
        return super().own_labels() if self.evaluated_network or self.pretrained_head else []

    @property
    def pretrained_head(self) -> Optional[Path]:
        """The file with the head of `pretrained`, if it has one."""
        file = None if self.pretrained is None else Path(self.pretrained_folder()) / HEAD_FILE
        return file if file is not None and file.exists() else None

    def head_settings(self) -> dict[str, Any]:
        return self.label_settings()

    def new_network(self) -> transformers.PreTrainedModel:
        return self.add_head(super().new_network())

    def pretrained_network(self) -> transformers.PreTrainedModel:
        network = self.add_head(super().pretrained_network())
        own, labels = self.own_labels(), self.trainer.datamodule.labels
        if self.pretrained_head and (own == labels or (self.keep_head and len(own) == len(labels))):
            weights = safetensors.torch.load_file(self.pretrained_head)
            sizes = (weights["arc"].shape[1], weights["relation_head.weight"].shape[0])
            if sizes != (self.arc_size, self.relation_size):
                raise UserError(
                    f"the head of {self.pretrained} has model.arc_size {sizes[0]} and model.relation_size {sizes[1]}, "
                    f"not {self.arc_size} and {self.relation_size}: use the same sizes"
                )
            network.parser.load_state_dict(weights)
        else:
            self.new_tensors += [f"parser.{key}" for key in network.parser.state_dict()]
            self.print(f"the head is new: {sum(p.numel() for p in network.parser.parameters()):,} parameters")
        return network

    def replace_head(self, builder: NetworkBuilder, network: transformers.PreTrainedModel) -> None:
        """Does nothing: the head is not a part of the network yet; `pretrained_network` adds it."""

    def add_head(self, network: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
        """Adds the head to a network."""
        size = network.config.hidden_size
        labels = len(self.trainer.datamodule.labels)
        network.parser = Biaffine(size, labels, self.arc_size, self.relation_size, self.dropout)
        return network

    def network_made(self) -> None:
        if getattr(self.network, "pooler", None) is not None:
            self.network.pooler.requires_grad_(False)  # its output is not used
        self.counts = Counts(sorted({universal_relation(label) for label in self.trainer.datamodule.labels}))
        self.arcs, self.mistakes = Ratio(), Mistakes()

    # Steps

    def scores(self, batch: dict) -> tuple[Tensor, Tensor, Tensor]:
        """The outputs of `Biaffine`. Scores of heads are in float32; -inf for truncated words and the word itself."""
        hidden = self.network(**network_inputs(batch))[0]
        places = batch["words"].clamp(min=0).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        arcs, dependents, heads = self.network.parser(hidden.gather(1, places))
        words = arcs.shape[1]
        itself = F.pad(torch.eye(words, dtype=torch.bool, device=arcs.device), (1, 0))
        absent = F.pad(batch["words"] < 0, (1, 0)).unsqueeze(1)
        return arcs.float().masked_fill(itself | absent, -torch.inf), dependents, heads

    def losses(self, scores: tuple[Tensor, Tensor, Tensor], batch: dict) -> tuple[Tensor, Tensor]:
        """Cross entropy of heads and relations, summed over the words that have both, () float32, and their number."""
        arcs, dependents, heads = scores
        # Truncated heads and words have no scores.
        places = F.pad(batch["words"], (1, 0)).gather(1, batch["targets"].clamp(min=0))
        counts = (batch["words"] >= 0) & (batch["targets"] >= 0) & (places >= 0)
        targets = batch["targets"].masked_fill(~counts, -100)
        relations = self.network.parser.relations(dependents, heads, targets.clamp(min=0)).float()
        loss = F.cross_entropy(arcs.flatten(0, 1), targets.flatten(), reduction="sum")
        named = batch["relations"].masked_fill(~counts, -100)
        return loss + F.cross_entropy(relations.flatten(0, 1), named.flatten(), reduction="sum"), counts.sum()

    def loss(self, batch: dict) -> tuple[Tensor, Tensor]:
        """The loss of a batch, summed over targets, and their number.

        Batches have `input_ids`, `attention_mask` and, for some tokenizers, `token_type_ids`, (B, T) int64; `id`, B
        ints; `words`, (B, W) int64, as in tagging; `targets`, (B, W) int64, the numbers of the words' heads, from 1, or
        0 for the root; and `relations`, (B, W) int64, the ids of the relations. Missing ones are -100.
        """
        return self.losses(self.scores(batch), batch)

    def decode_predictions(self, scores: tuple[Tensor, Tensor, Tensor], batch: dict) -> tuple[Tensor, Tensor]:
        """Head and relation of each word in the best trees, (B, W) int64 each; -100 for truncated words."""
        arcs, dependents, heads = scores
        predicted = torch.full(batch["words"].shape, -100)
        weights = arcs.log_softmax(-1).double().cpu().numpy()
        for row, places in enumerate(batch["words"].tolist()):
            words = [word for word, place in enumerate(places) if place >= 0]
            if words:
                columns = [0, *(1 + word for word in words)]
                tree = spanning_tree(weights[row][words][:, columns])
                predicted[row, words] = torch.tensor(columns)[tree]
        predicted = predicted.to(arcs.device)
        relations = self.network.parser.relations(dependents, heads, predicted.clamp(min=0)).float()
        labels = self.trainer.datamodule.labels
        if ROOT in labels and len(labels) > 1:
            is_root = torch.arange(len(labels), device=predicted.device) == labels.index(ROOT)
            relations = relations.masked_fill(is_root != (predicted == 0).unsqueeze(-1), -torch.inf)
        return predicted, relations.argmax(-1).masked_fill(predicted < 0, -100)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        scores, labels = self.scores(batch), self.trainer.datamodule.labels
        self.val_loss.update(*self.losses(scores, batch))
        heads, relations = self.decode_predictions(scores, batch)
        counts = batch["targets"] >= 0
        self.arcs.update(((heads == batch["targets"]) & counts).sum(), counts.sum())
        gold = (batch["targets"].tolist(), batch["relations"].tolist())
        for number, *sentences in zip(batch["id"], zip(*gold), zip(heads.tolist(), relations.tolist())):
            right, found = (arcs(*sentence, labels) for sentence in sentences)
            self.counts.update(right, found)
            if wrong := len(set(right) - set(found)):
                self.mistakes.add(number, float(wrong), right, found)

    def described(self, split: str, row: int, right: list[Arc], predicted: list[Arc]) -> dict[str, str]:
        """A row in readable form: its text, and the correct and predicted arcs that differ."""
        data = self.trainer.datamodule
        example = data.examples[split].rows[row]
        words = [ROOT.upper(), *words_of(data.tokenizer, example)]

        def names(arcs: list[Arc], others: list[Arc]) -> str:
            left = [arc for arc in arcs if arc not in others]
            return "; ".join(f"{words[word + 1]} <- {relation} - {words[head]}" for relation, (word, head) in left)

        text = readable(data.tokenizer, example["input_ids"])
        return {"text": text, "correct": names(right, predicted), "predicted": names(predicted, right)}

    def metric_modes(self) -> dict[str, Optional[Mode]]:
        return {"loss": "min", "uas": "max", "las": "max"}

    def metrics(self, loss: Tensor, split: str) -> dict[str, Tensor]:
        """Adds the unlabeled and labeled attachment scores, and writes the scores of each relation."""
        counts, uas = self.counts.compute(), self.arcs.compute()
        self.counts.reset()
        self.arcs.reset()
        self.mistakes.write(self.trainer, self.title(split), partial(self.described, split))
        scores = results.label_scores(list(self.counts.numbers), *counts)
        results.write(scores, self.title(split), self.trainer)
        return {"loss": loss, "uas": uas, "las": counts[0].sum() / counts[1].sum().clamp(min=1)}

    def predict_step(self, batch: dict, batch_idx: int) -> list[dict]:
        """For each row: its number, `id`, and the `heads` and `relations` of its words, None for truncated words."""
        labels = self.trainer.datamodule.labels
        heads, relations = self.decode_predictions(self.scores(batch), batch)
        rows = []
        for number, places, own, names in zip(batch["id"], batch["words"].tolist(), heads.tolist(), relations.tolist()):
            words = [word for word, place in enumerate(places) if place != -100]
            rows.append(
                {
                    "id": number,
                    "heads": [own[word] if places[word] != TRUNCATED else None for word in words],
                    "relations": [labels[names[word]] if places[word] != TRUNCATED else None for word in words],
                }
            )
        return rows


def universal_relation(relation: str) -> str:
    """A relation without its subtype, which the CoNLL 2018 script ignores: `nsubj:pass` becomes `nsubj`."""
    return relation.partition(":")[0]


def arcs(heads: list[int], relations: list[int], labels: list[str]) -> list[Arc]:
    """The arcs of a sentence, each a universal relation and (word, head); words without a head are omitted."""
    return [
        (universal_relation(labels[r]), (word, head))
        for word, (head, r) in enumerate(zip(heads, relations))
        if head >= 0
    ]
