"""GPT: causal language models."""

from typing import Any, Optional

import torch
import transformers
from torch import Tensor

from lm_lightning.data import contract
from lm_lightning.data.order import PADDING
from lm_lightning.errors import UserError
from lm_lightning.losses import cross_entropy, linear_cross_entropy
from lm_lightning.models.attention import for_checks, is_flash, packed_inputs
from lm_lightning.models.metrics import Mode, bits_per_byte
from lm_lightning.models.module import LanguageModule
from lm_lightning.models.unigram import start_at_frequencies
from lm_lightning.networks import add_end_tokens, headless


class CausalLM(LanguageModule):
    """Any causal network of `transformers` (GPT-2, Llama, Qwen, ...), trained to predict the next token.

    Args:
        unigram_start: Whether a new network predicts tokens with their frequencies in the training data when it starts,
            so that they need not be learned. This needs a head with a bias, or a layer norm with a bias before it (as
            in GPT-2, but not in Llama); it has no effect on other networks.
        options: Options of all models, see `LanguageModule`.
    """

    auto_class = transformers.AutoModelForCausalLM

    def __init__(self, unigram_start: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.unigram_start = unigram_start

    def network_made(self) -> None:
        # Blocks have no padding. With a padding token, which is often also the end-of-text token, a network would
        # search for it in every batch, which makes the host wait for a GPU, and its embedding would get no gradient.
        self.network.config.pad_token_id = None
        self.network.get_input_embeddings().padding_idx = None
        with for_checks(self.network):
            self.has_linear_head = self.head_is_last()
            self.refuse_leaks()
        counts = contract.optional(self.trainer.datamodule, "token_counts")
        if self.unigram_start and self.settings is not None and counts is not None and self.trainer.state.fn == "fit":
            start_at_frequencies(self.network, counts)
        if ends := contract.optional(self.trainer.datamodule, "end_tokens"):
            add_end_tokens(self.network, ends)

    @torch.no_grad()
    def refuse_leaks(self) -> None:
        """Refuses networks that attend to following tokens, or to other documents although these are masked.

        Raises:
            UserError: Names the type of network.
        """
        network, name = self.network.eval(), self.network.config.model_type
        first = torch.arange(8, device=network.device).unsqueeze(0)
        last_changed, first_changed = first.clone(), first.clone()
        last_changed[0, -1] += 1
        first_changed[0, 0] += 1

        def same(other: Tensor, places: slice, **inputs: Tensor) -> bool:
            """Whether `other` has the same logits as `first` at these positions."""
            ours, theirs = (network(input_ids=t, use_cache=False, **inputs).logits[:, places] for t in (first, other))
            return torch.allclose(ours, theirs, atol=1e-5)

        if not same(last_changed, slice(0, 7)):
            raise UserError(
                f"networks of type {name} attend to following tokens: use a causal one, such as gpt2 or llama"
            )
        if contract.optional(self.trainer.datamodule, "mask_documents"):
            positions = torch.arange(8, device=network.device).unsqueeze(0) % 4  # two documents
            try:
                masked = same(first_changed, slice(4, 8), position_ids=positions)
            except TypeError:  # it has no argument for positions
                masked = False
            if not masked:
                raise UserError(f"data.mask_documents does not work with networks of type {name}: set it to false")
        network.train()

    @torch.no_grad()
    def head_is_last(self) -> bool:
        """Whether the logits are exactly the head applied to the last hidden states, tested on a few tokens.

        Some networks scale or cap the logits after the head (Gemma 2, Granite, Cohere, ...); their loss is computed
        from their own logits.
        """
        network = self.network.eval()
        tokens = torch.arange(4, device=network.device).unsqueeze(0)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        try:
            expected = network(**inputs, use_cache=False).logits
            return torch.equal(network.get_output_embeddings()(self.hidden(inputs)), expected)
        except (AttributeError, TypeError, RuntimeError):  # it has another structure: its own logits are used
            return False
        finally:
            network.train()

    def hidden(self, inputs: dict[str, Tensor]) -> Tensor:
        """The inputs of the head: (B, T, H). The full network is called, because strategies hook into that."""
        with headless(self.network):
            return self.network(**inputs, use_cache=False).logits

    def outputs(self, batch: dict) -> Tensor:
        """The inputs of the head if `has_linear_head`, (B, T, H), else the logits: (B, T, V)."""
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
        packed = is_flash(self.network) and "position_ids" in inputs and "attention_mask" not in inputs
        if packed:
            inputs = packed_inputs(**inputs)
        output = self.hidden(inputs) if self.has_linear_head else self.network(**inputs, use_cache=False).logits
        return output.reshape(*batch["input_ids"].shape, -1) if packed else output

    def loss(self, batch: dict) -> tuple[Tensor, Tensor]:
        return self.token_loss(self.outputs(batch).flatten(0, 1), batch["targets"].flatten())

    def token_loss(self, output: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, summed over the tokens with a target, and their number.

        Args:
            output: As from `outputs`, (N, H) or (N, V).
            targets: (N,) int64, -100 where there is none.
        """
        if self.has_linear_head:
            head = self.network.get_output_embeddings()
            loss = linear_cross_entropy(output, head.weight, head.bias, targets, self.vocab_size)
        else:
            loss = cross_entropy(output[:, : self.vocab_size], targets)
        return loss, (targets != -100).sum()

    def distillation_loss(self, batch: dict, teacher: Any, distiller: Any) -> tuple[Tensor, Tensor, Tensor]:
        targets = batch["targets"].flatten()
        with torch.no_grad():
            other = teacher.outputs(batch).flatten(0, 1)
        output = self.outputs(batch).flatten(0, 1)
        loss, distillation = distiller.token_losses(self, output, teacher, other, targets)
        return loss, (targets != -100).sum(), distillation

    def metric_modes(self) -> dict[str, Optional[Mode]]:
        modes: dict[str, Optional[Mode]] = {"loss": "min", "perplexity": "min"}
        return modes | ({"bits_per_byte": "min"} if contract.optional(self.trainer.datamodule, "splits") else {})

    def predict_step(self, batch: dict, batch_idx: int) -> list[dict]:
        """How well each sample is predicted: its `id`, `tokens`, mean `loss` in nats per token, and `text`.

        Without ids, samples are numbered in the order of the batches; without a tokenizer, there is no `text`.
        """
        rows, size, place = [], contract.rows(batch), contract.place(self.trainer)
        self.predicted_rows = max(size, getattr(self, "predicted_rows", 0))  # of a full batch
        first = (batch_idx * place["num_replicas"] + place["rank"]) * self.predicted_rows
        output = self.outputs(batch)
        for i, sample in enumerate(contract.sample_ids(batch) or range(first, first + size)):
            # (also for padding, as all processes must call a sharded head together)
            loss, tokens = self.token_loss(output[i], batch["targets"][i])
            if sample != PADDING:
                row = {"id": sample, "tokens": tokens.item(), "loss": (loss / tokens).item()}
                text = {} if self.tokenizer is None else {"text": self.tokenizer.decode(batch["input_ids"][i])}
                rows.append(row | text)
        return rows

    def metrics(self, loss: Tensor, split: str) -> dict[str, Tensor]:
        """Adds perplexity, and bits per UTF-8 byte of the text, which are comparable between different tokenizers."""
        values = {"loss": loss, "perplexity": loss.exp()}
        if (counts := contract.optional(self.trainer.datamodule, "splits").get(split)) is not None:
            values["bits_per_byte"] = bits_per_byte(loss, len(counts.tokens) - 1, counts.bytes)
        return values
