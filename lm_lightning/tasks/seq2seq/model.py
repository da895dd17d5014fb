"""Sequence to sequence: encoder-decoders that write a text for a text."""

from typing import Any, Optional

import torch
import transformers
from torch import Tensor

from lm_lightning import hub
from lm_lightning.data.tokenizer import fingerprint, load, vocabulary
from lm_lightning.errors import UserError
from lm_lightning.finetuning.store import NotesPart
from lm_lightning.generation.decoding import Decoding, write_texts
from lm_lightning.generation.evaluation import Task, TextEvaluation
from lm_lightning.losses import linear_losses
from lm_lightning.models import build
from lm_lightning.models.attention import for_checks
from lm_lightning.models.metrics import Mode
from lm_lightning.models.module import LanguageModule
from lm_lightning.networks import headless, positions
from lm_lightning.run import pretrained_name
from lm_lightning.strategies.capabilities import capabilities
from lm_lightning.tasks.seq2seq.smoothing import Smoothing
from lm_lightning.tasks.seq2seq.tokens import DecoderTokens, decoder_tokens


class Seq2Seq(LanguageModule):
    """An encoder-decoder of `transformers` (T5, BART, mBART, ...), for translation, summarization and the like.

    Args:
        decoder: Folder, run or Hub name of a decoder, such as a GPT or a BERT, whose tokenizer is that of `pretrained`,
            an encoder such as a BERT: both become an `EncoderDecoderModel`, with new cross-attention between them.
        label_smoothing: Fraction of the target that is distributed over all tokens, in training; the loss of
            evaluations is without it.
        decoding: How texts are generated, also by the exported model.
        evaluation: Scores of generated texts.
        options: Options of all models, see `LanguageModule`.
    """

    auto_class = transformers.AutoModelForSeq2SeqLM

    def __init__(
        self,
        decoder: Optional[str] = None,
        label_smoothing: float = 0.0,
        decoding: Decoding = Decoding(),
        evaluation: TextEvaluation = TextEvaluation(),
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if decoder is not None and self.pretrained is None:
            raise UserError("model.decoder needs an encoder, model.pretrained: give it, or omit model.decoder")
        if not 0 <= label_smoothing < 1:
            raise UserError(f"model.label_smoothing is {label_smoothing}, but must be from 0 to below 1")
        decoding.check()
        evaluation.check()
        self.decoder, self.label_smoothing = decoder, label_smoothing
        self.decoding, self.evaluation = decoding, evaluation

    # Network

    def decoder_tokens(self) -> DecoderTokens:
        """The special tokens of the decoder, see `DecoderTokens`; known before the network is made."""
        start = (self.settings or {}).get("decoder_start_token_id")
        if self.evaluated_network is not None:
            start = build.config_of(self.evaluated_network).decoder_start_token_id
        elif self.pretrained is not None and not self.joins():
            start = getattr(hub.config(self.pretrained_folder()), "decoder_start_token_id", None)
        return decoder_tokens(self.trainer.datamodule.tokenizer, start)

    def new_network(self) -> transformers.PreTrainedModel:
        settings = dict(self.settings or {})
        rows = -(-vocabulary(self.trainer.datamodule.tokenizer) // 64) * 64
        own: dict[str, Any] = {
            "decoder_start_token_id": self.decoder_tokens().start,
            "forced_bos_token_id": None,
            "forced_eos_token_id": None,
            "decoder_vocab_size": rows,
        }
        model_type = settings.get("model_type")
        if model_type in transformers.CONFIG_MAPPING and model_type != "encoder-decoder":
            known = transformers.AutoConfig.for_model(model_type)
            settings = {name: value for name, value in own.items() if hasattr(known, name)} | settings
        return self.builder().new(settings)

    def joins(self) -> bool:
        """Whether the network is made of an encoder and a decoder; a model that was made so is loaded as it is."""
        return self.decoder is not None and not getattr(
            hub.config(self.pretrained_folder()), "is_encoder_decoder", False
        )

    def pretrained_network(self) -> transformers.PreTrainedModel:
        return self.joined() if self.joins() else super().pretrained_network()

    def joined(self) -> transformers.PreTrainedModel:
        """The network of an encoder and a decoder; sets `new_tensors`."""
        encoder, decoder = self.pretrained_folder(), pretrained_name(str(self.decoder))
        tokenizer = self.trainer.datamodule.tokenizer
        if fingerprint(load(str(self.decoder))) != fingerprint(tokenizer):
            raise UserError(
                f"{self.decoder} has another tokenizer than {self.pretrained}: give a decoder that was trained with "
                f"--data.tokenizer.path {self.pretrained}"
            )
        builder = self.builder()
        parts: dict[str, Any] = {}
        for name, folder in (("encoder", encoder), ("decoder", decoder)):
            config = hub.config(folder)
            builder.check(config)
            parts[f"{name}_local_files_only"] = hub.local_only(folder)
            parts[f"{name}_dtype"] = torch.float32
            if self.attn_implementation is not None:
                parts[f"{name}_attn_implementation"] = self.attn_implementation
        network = transformers.EncoderDecoderModel.from_encoder_decoder_pretrained(encoder, decoder, **parts)
        new = ("crossattention", "cross_attn", "enc_to_dec_proj")
        self.new_tensors = [name for name, _ in network.named_parameters() if any(part in name for part in new)]
        self.print(f"{len(self.new_tensors)} tensors of the cross-attention are new")
        network.config.vocab_size = network.config.decoder.vocab_size
        return network

    def network_made(self) -> None:
        tokens, network, tokenizer = self.decoder_tokens(), self.network, self.trainer.datamodule.tokenizer
        if len(tokens.prefix) > 1:
            raise UserError("the tokenizer writes several special tokens before a target, but at most one is supported")
        special = {
            "decoder_start_token_id": tokens.start,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokens.end,
        }
        for name, value in special.items():
            setattr(network.config, name, value)
        forced = tokens.prefix[0] if tokens.prefix else None
        for name, value in (("forced_bos_token_id", forced), ("forced_eos_token_id", None)):
            if hasattr(network.config, name):
                setattr(network.config, name, value)
        network.generation_config = self.decoding.config(**special, forced_bos_token_id=forced)
        limit = positions(getattr(network, "decoder", network))
        if limit is not None and self.decoding.max_new_tokens > limit:
            raise UserError(
                f"model.decoding.max_new_tokens is {self.decoding.max_new_tokens}, but this network has positions for "
                f"{limit} tokens: lower it, or use a network with more positions"
            )
        with for_checks(network):
            self.has_linear_head = self.head_is_last()

    @torch.no_grad()
    def head_is_last(self) -> bool:
        """Whether the logits are exactly the head and its bias applied to the last hidden states."""
        network = self.network.eval()
        tokens = torch.arange(4, device=network.device).unsqueeze(0)
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "targets": tokens}
        try:
            expected = self.logits(batch)
            hidden, bias = self.hidden(batch)
            logits = torch.nn.functional.linear(hidden, network.get_output_embeddings().weight, bias)
            return torch.allclose(logits, expected, atol=1e-5)
        except (AttributeError, TypeError, RuntimeError):  # of another structure: its own logits are used
            return False
        finally:
            network.train()

    # Steps

    def inputs(self, batch: dict) -> dict[str, Any]:
        """The inputs of the network: those of the encoder, and the targets shifted right, which the decoder reads."""
        config, targets = self.network.config, batch["targets"]
        shifted = torch.full_like(targets, config.decoder_start_token_id)
        shifted[:, 1:] = targets[:, :-1].masked_fill(targets[:, :-1] == -100, config.pad_token_id)
        names = ("input_ids", "attention_mask")
        return {name: batch[name] for name in names} | {"decoder_input_ids": shifted, "use_cache": False}

    def logits(self, batch: dict) -> Tensor:
        """Logits of the next tokens, (B, T, V)."""
        return self.network(**self.inputs(batch)).logits

    def hidden(self, batch: dict) -> tuple[Tensor, Optional[Tensor]]:
        """The inputs of the head, (B, T, H), and the bias of the logits, (V,), if there is one.

        The full network is called, because strategies hook into that.
        """
        head, added = self.network.get_output_embeddings(), getattr(self.network, "final_logits_bias", None)
        with headless(self.network):
            if added is None:
                return self.logits(batch), head.bias
            self.network.final_logits_bias = added.new_zeros(1)
            try:
                return self.logits(batch), added[0] if head.bias is None else head.bias + added[0]
            finally:
                self.network.final_logits_bias = added

    def loss(self, batch: dict) -> tuple[Tensor, Tensor]:
        """The loss of a batch, summed over target tokens, and their number.

        Batches have `input_ids` and `attention_mask`, (B, S) int64; `targets`, (B, T) int64, the tokens to write, with
        their end, -100 where there is none; and `id`, B ints.
        """
        targets = batch["targets"].flatten()
        if self.has_linear_head:
            hidden, bias = self.hidden(batch)
            weight = self.network.get_output_embeddings().weight
            second = Smoothing(self.smoothing) if self.smoothing else None
            loss, _ = linear_losses(hidden.flatten(0, 1), weight, bias, targets, self.vocab_size, second)
        else:
            loss = self.loss_of(self.logits(batch).flatten(0, 1), targets)
        return loss, (targets != -100).sum()

    @property
    def smoothing(self) -> float:
        """The label smoothing of the loss, which is used in training only."""
        return self.label_smoothing if self.network.training else 0.0

    def loss_of(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of (N, V) logits, summed over those of the N targets that are not -100, () float32."""
        logits = logits[:, : self.vocab_size].float()
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=self.smoothing)

    def distillation_loss(self, batch: dict, teacher: Any, distiller: Any) -> tuple[Tensor, Tensor, Tensor]:
        targets, logits = batch["targets"].flatten(), self.logits(batch).flatten(0, 1)
        with torch.no_grad():
            other = teacher.logits(batch).flatten(0, 1)
        losses = distiller.divergence(logits[:, : self.vocab_size], other[:, : self.vocab_size])
        distillation = losses.masked_fill(targets == -100, 0).sum()
        loss = distiller.mix(self.loss_of(logits, targets), distillation)
        return loss, (targets != -100).sum(), distillation

    # Texts

    def texts(self, batch: dict) -> list[str]:
        """The texts that the network writes for a batch; all processes call it."""
        together = self.trainer.world_size > 1 and capabilities(self.trainer.strategy).shards_parameters
        if together:  # `generate` calls the encoder by itself; FSDP gathers what is in no block for the full network
            first = {name: batch[name][:1, :1] for name in ("input_ids", "attention_mask")}
            self.logits(first | {"targets": first["input_ids"]})
        return write_texts(
            self.network, self.tokenizer, batch["input_ids"], batch["attention_mask"], self.vocab_size, together
        )

    def metric_modes(self) -> dict[str, Optional[Mode]]:
        modes: dict[str, Optional[Mode]] = {"loss": "min", "perplexity": "min"}
        return modes | self.evaluation.modes()

    def metrics(self, loss: Tensor, split: str) -> dict[str, Tensor]:
        """Adds perplexity, and the scores of generated texts."""
        data = self.trainer.datamodule
        examples = data.examples[split]

        def generate(rows: list[int]) -> list[str]:
            items = [examples.rows[row] | {"id": row} for row in rows]
            return self.texts(data.collate(items))

        notes = examples.rows.notes()
        sources, references = (NotesPart(notes, place) for place in (0, 1))
        task = Task(sources, references, examples.lengths, generate)
        return {"loss": loss, "perplexity": loss.exp()} | self.evaluation.run(self, task)

    def predict_step(self, batch: dict, batch_idx: int) -> list[dict]:
        """For each row: its number, `id`, and the `text` that the network writes."""
        return [{"id": number, "text": text} for number, text in zip(batch["id"], self.texts(batch))]
