"""BERT: masked language models, with or without next-sentence prediction."""

from typing import Any, Optional

import torch
import transformers
from torch import Tensor, nn

from lm_lightning.console import printable
from lm_lightning.errors import UserError
from lm_lightning.losses import cross_entropy, linear_cross_entropy
from lm_lightning.models.attention import for_checks
from lm_lightning.models.metrics import Mode, Ratio
from lm_lightning.models.module import LanguageModule
from lm_lightning.networks import headless


class MaskedLM(LanguageModule):
    """Any masked language model of `transformers` (BERT, RoBERTa, ModernBERT, DistilBERT, ...).

    If the data has next-sentence pairs, the network is `BertForPreTraining` or another one with a head for
    next-sentence prediction, and the loss is the sum of both mean losses, as in BERT (Devlin et al., 2019,
    arXiv:1810.04805).

    Args:
        unigram_start: Whether the bias of a new network's head is initialized to the logarithms of the tokens'
            frequencies, so that they need not be learned. No effect if the head has no bias.
        top_k: Number of most probable tokens that `predict` returns for each mask token.
        options: Options of all models, see `LanguageModule`.
    """

    def __init__(self, unigram_start: bool = True, top_k: int = 5, **options: Any) -> None:
        super().__init__(**options)
        if top_k < 1:
            raise UserError(f"model.top_k is {top_k}, but must be 1 or more")
        self.unigram_start, self.top_k = unigram_start, top_k
        self.val_accuracy, self.val_next_loss, self.val_next_accuracy = Ratio(), Ratio(), Ratio()

    @property
    def auto_class(self) -> type:  # type: ignore[override]
        """The auto class that creates the network; with next-sentence pairs, the one for the original pretraining."""
        pairs = self.trainer.datamodule.next_sentence
        return transformers.AutoModelForPreTraining if pairs else transformers.AutoModelForMaskedLM

    def network_made(self) -> None:
        # There is an attention mask. With a padding token, networks would also search for it, which synchronizes GPUs.
        self.network.config.pad_token_id = None
        self.has_linear_head = True
        with for_checks(self.network):
            self.has_linear_head = self.head_is_last()
        bias = getattr(self.network.get_output_embeddings(), "bias", None)
        if self.unigram_start and self.settings is not None and bias is not None:
            counts = torch.from_numpy(self.trainer.datamodule.prepared.frequencies() + 1.0)
            bias.data[: len(counts)] = (counts / counts.sum()).log()

    @torch.no_grad()
    def head_is_last(self) -> bool:
        """Whether the loss can be computed from the inputs of the head's last layer; tested with a few tokens."""
        network = self.network.eval()
        tokens = torch.arange(8, device=network.device).unsqueeze(0)
        positions = torch.tensor([[1, 5]], device=network.device)
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        try:
            output = self.outputs(batch | {"positions": positions})
            expected = prediction_logits(network(**batch))[:, positions[0]]
            return torch.allclose(network.get_output_embeddings()(prediction_logits(output)), expected, atol=1e-4)
        except (AttributeError, TypeError, RuntimeError):  # another architecture: its own forward is used
            return False
        finally:
            network.train()

    def outputs(self, batch: dict) -> Any:
        """The outputs of the network, with prediction logits only for the targets, (B, K, V).

        If `has_linear_head`, they have the inputs of the head's last layer, (B, K, H), instead of the logits.
        Otherwise, the logits of the targets are gathered from the logits of all tokens.
        """
        names = ("input_ids", "attention_mask", "token_type_ids")
        inputs = {name: batch[name] for name in names if name in batch}
        positions = batch["positions"].unsqueeze(-1)

        if not self.has_linear_head:
            output = self.network(**inputs)
            name = "prediction_logits" if "prediction_logits" in output else "logits"
            output[name] = output[name].gather(1, positions.expand(-1, -1, output[name].shape[-1]))
            return output

        def gather(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = output.last_hidden_state
            output.last_hidden_state = hidden.gather(1, positions.expand(-1, -1, hidden.shape[-1]))
            return output

        hook = self.network.base_model.register_forward_hook(gather)
        try:
            with headless(self.network):
                return self.network(**inputs)
        finally:
            hook.remove()

    def losses(self, batch: dict) -> dict[str, Tensor]:
        """Sums over a batch: `masked` loss and number of `tokens`; with pairs, `next` loss and number of `pairs`."""
        output, targets = self.outputs(batch), batch["targets"].flatten()
        head, hidden = self.network.get_output_embeddings(), prediction_logits(output).flatten(0, 1)
        sums = {"tokens": (targets != -100).sum()}
        if self.has_linear_head:
            sums["masked"] = linear_cross_entropy(hidden, head.weight, head.bias, targets, self.vocab_size)
        else:
            sums["masked"] = cross_entropy(hidden[..., : self.vocab_size], targets)
        if not self.training:
            logits = head(hidden) if self.has_linear_head else hidden
            sums["correct"] = (logits[..., : self.vocab_size].argmax(-1) == targets).sum()
        if "next_sentence" in batch:
            labels = batch["next_sentence"]
            logits = getattr(output, "seq_relationship_logits", None)
            if logits is None:
                raise UserError(
                    f"{type(self.network).__name__} has no head for next-sentence prediction: set data.next_sentence "
                    "to false, or use model_type bert"
                )
            sums["next"], sums["pairs"] = cross_entropy(logits, labels), (labels != -100).sum()
            sums["next_right"] = (logits.argmax(-1) == labels).sum()
        return sums

    def loss(self, batch: dict) -> tuple[Tensor, Tensor]:
        """The loss of a batch, summed over targets, and their number.

        Batches have `input_ids` and, with pairs, `attention_mask` and `token_type_ids`, (B, T) int64; `id`, B ints;
        `positions`, (B, K) int64, the positions of the targets; `targets`, (B, K) int64, the original tokens, -100 for
        missing ones; and, with pairs, `next_sentence`, (B,) int64, see `MaskedPairs`.
        """
        sums = self.losses(batch)
        if "next" not in sums:
            return sums["masked"], sums["tokens"]
        # A pair has the weight of the targets of a full block, so that the mean over targets is the sum of both means.
        return sums["masked"] + sums["next"] * batch["targets"].shape[1], sums["tokens"]

    def distillation_loss(self, batch: dict, teacher: Any, distiller: Any) -> tuple[Tensor, Tensor, Tensor]:
        targets, output = batch["targets"].flatten(), self.outputs(batch)
        with torch.no_grad():
            other = teacher.outputs(batch)
        tokens, other_tokens = (prediction_logits(both).flatten(0, 1) for both in (output, other))
        loss, distillation = distiller.token_losses(self, tokens, teacher, other_tokens, targets)
        if "next_sentence" in batch:  # weighted as in `loss`
            labels, size = batch["next_sentence"], batch["targets"].shape[1]
            logits = output.seq_relationship_logits
            pairs = distiller.divergence(logits, other.seq_relationship_logits).masked_fill(labels == -100, 0).sum()
            loss = loss + distiller.mix(cross_entropy(logits, labels), pairs) * size
            distillation = distillation + pairs * size
        return loss, (targets != -100).sum(), distillation

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        sums = self.losses(batch)
        self.val_loss.update(sums["masked"], sums["tokens"])
        self.val_accuracy.update(sums["correct"], sums["tokens"])
        if "next" in sums:
            self.val_next_loss.update(sums["next"], sums["pairs"])
            self.val_next_accuracy.update(sums["next_right"], sums["pairs"])

    def metric_modes(self) -> dict[str, Optional[Mode]]:
        modes: dict[str, Optional[Mode]] = {"loss": "min", "perplexity": "min", "accuracy": "max"}
        if self.trainer.datamodule.next_sentence:
            modes |= {"next_sentence_loss": "min", "next_sentence_accuracy": "max"}
        return modes

    def metrics(self, loss: Tensor, split: str) -> dict[str, Tensor]:
        """Adds perplexity and accuracy of the masked tokens, and loss and accuracy of next-sentence prediction."""
        result = {"loss": loss, "perplexity": loss.exp(), "accuracy": self.val_accuracy.compute()}
        self.val_accuracy.reset()
        if self.trainer.datamodule.next_sentence:
            result["next_sentence_loss"] = self.val_next_loss.compute()
            result["next_sentence_accuracy"] = self.val_next_accuracy.compute()
            self.val_next_loss.reset()
            self.val_next_accuracy.reset()
        return result

    def predict_step(self, batch: dict, batch_idx: int) -> list[dict]:
        """Fills in a text: the most probable tokens for each mask token with their probabilities, and the full text."""
        tokenizer = self.trainer.datamodule.tokenizer
        ids = batch["input_ids"][0]
        logits = prediction_logits(self.network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]))
        places = (ids == tokenizer.mask_token_id).nonzero().flatten()
        best = logits[0, places, : self.vocab_size].float().softmax(-1).topk(self.top_k)
        filled = ids.clone()
        filled[places] = best.indices[:, 0]
        row = {
            "id": batch["id"][0],
            "text": tokenizer.decode(ids),
            "masks": [
                [
                    {"token": token, "probability": p}
                    for token, p in zip(tokenizer.convert_ids_to_tokens(i), probabilities)
                ]
                for i, probabilities in zip(best.indices.tolist(), best.values.tolist())
            ],
            "filled": tokenizer.decode(filled, skip_special_tokens=True),
        }
        self.print(printable(row["filled"]))
        for place in row["masks"]:
            self.print("  " + ", ".join(f"{printable(c['token'])} {c['probability']:.3f}" for c in place))
        return [row]


def prediction_logits(output: Any) -> Tensor:
    """The token logits in a network's outputs, for which `BertForPreTraining` has a different name."""
    logits = getattr(output, "prediction_logits", None)
    return output.logits if logits is None else logits
