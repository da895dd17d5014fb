"""What the recurrent and the convolutional network share: embeddings, head, documents, and the state in generation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from lm_lightning.baselines.compat import PassesState
from lm_lightning.baselines.segments import find_segments


@dataclass
class State:
    """What a network remembers of the tokens that it has read.

    Attributes:
        tokens: These tokens, with padding: (B, T) int64.
        layers: The state of each layer, a tuple of tensors (B, ...).
    """

    tokens: Tensor
    layers: tuple[Tensor, ...]

    def is_after(self, tokens: Tensor) -> bool:
        """Whether this is the state after these tokens, (B, T) int64."""
        return torch.equal(self.tokens, tokens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Selects rows, as the beam search of `transformers` needs it."""
        self.tokens, self.layers = self.tokens[beam_idx], tuple(layer[beam_idx] for layer in self.layers)


@dataclass
class CausalOutput(ModelOutput):
    """Output of a network.

    Args:
        loss: Mean loss over the labels, () float32, if there are labels.
        logits: (B, T, V) float.
        state: The state after the last token, if `use_cache` is true.
    """

    loss: Optional[Tensor] = None
    logits: Optional[Tensor] = None
    state: Optional[State] = None


def check_settings(config: PreTrainedConfig, counts: Sequence[str], shares: Sequence[str]) -> None:
    """Refuses settings of a network.

    Raises:
        ValueError: If one of the `counts` is below 1, or one of the `shares` is not at least 0 and below 1.
    """
    for name in counts:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}, but must be 1 or more")
    for name in shares:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}, but must be at least 0 and below 1")


class OwnNetwork(PassesState, PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Base class of the networks of this package, which `transformers` does not have."""

    @classmethod
    def register(cls) -> None:
        """Makes the auto classes of `transformers` know this network."""
        AutoConfig.register(cls.config_class.model_type, cls.config_class, exist_ok=True)
        AutoModelForCausalLM.register(cls.config_class, cls, exist_ok=True)


class CausalNetwork(OwnNetwork):
    """Base class of the recurrent and the convolutional network, with `body`, a module that has `embed_tokens`.

    `body(tokens, lengths, layers)` reads tokens, (B, T) int64. In each row, the first `lengths`, (B,) int64 on the CPU,
    are tokens and the others padding (None: there is none). It continues after what the `layers` of a state have read
    (None: nothing), and returns its last hidden states, (B, T, H), and the layers of its new state.

    `position_ids` separate packed documents as for transformers: what follows a position that is not the previous one
    plus 1 does not see what is before. Padding, for which `attention_mask` is 0, is not read.
    """

    base_model_prefix = "body"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _tied_weights_keys = {"lm_head.weight": "body.embed_tokens.weight"}
    body: Any

    def __init__(self, config: PreTrainedConfig, body: nn.Module) -> None:
        super().__init__(config)
        self.body = body
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.body.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.body.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Optional[Tensor] = None,
        position_ids: Optional[Tensor] = None,
        labels: Optional[Tensor] = None,
        state: Optional[State] = None,
        use_cache: Optional[bool] = None,
        logits_to_keep: int = 0,
        return_dict: Optional[bool] = None,
        **options: Any,
    ) -> Union[CausalOutput, tuple]:
        """Computes logits.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T): 0 for padding; ignored with a state.
            position_ids: (B, T) int64: see the class; ignored with a state.
            labels: (B, T) int64, -100 for none. They are shifted here, as in `transformers`.
            state: What was read before. All tokens then belong to the same document.
            use_cache: Whether to return a state. Default: the config's, and no state in training.
            logits_to_keep: Number of last positions whose logits are returned; 0 for all.
            return_dict: Whether to return an object instead of a tuple.
            options: Other options of `transformers`, which have no effect.
        """
        use_cache = use_cache if use_cache is not None else not self.training and self.config.use_cache
        segments = None
        if state is None:
            positions = None if position_ids is None else position_ids.expand_as(input_ids)
            segments = find_segments(positions, attention_mask)
        tokens, lengths = (input_ids, None) if segments is None else (segments.split(input_ids), segments.lengths)
        hidden, layers = self.body(tokens, lengths, None if state is None else state.layers)
        if segments is not None:
            hidden, layers = segments.join(hidden), tuple(layer[segments.last] for layer in layers)
        logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        new = None
        if use_cache:
            read = input_ids if state is None else torch.cat([state.tokens, input_ids], dim=1)
            new = State(read, layers)
        output = CausalOutput(loss=loss, logits=logits, state=new)
        return output if return_dict is not False else output.to_tuple()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        state: Optional[State] = None,
        attention_mask: Optional[Tensor] = None,
        use_cache: Optional[bool] = None,
        logits_to_keep: int = 0,
        **options: Any,
    ) -> dict[str, Any]:
        """The arguments of the next call of the network, in `generate`."""
        inputs = {"use_cache": use_cache, "logits_to_keep": logits_to_keep}
        if state is not None and state.is_after(input_ids[:, :-1]):
            return inputs | {"input_ids": input_ids[:, -1:], "state": state}
        return inputs | {"input_ids": input_ids, "attention_mask": attention_mask}

    def _init_weights(self, module: nn.Module) -> None:
        reset: Any = getattr(module, "reset_weights", None)
        if reset is not None:
            reset()
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif module is self.lm_head:
            init.zeros_(module.bias)


def locked_dropout(hidden: Tensor, share: float, training: bool) -> Tensor:
    """Dropout that is the same at all positions of a row (Gal and Ghahramani, 2016, arXiv:1512.05287).

    Args:
        hidden: (B, T, H) float.
        share: Share of the units that are dropped.
        training: Whether to drop any.
    """
    if not training or not share:
        return hidden
    return hidden * F.dropout(torch.ones_like(hidden[:, :1]), share)
