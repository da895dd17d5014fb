"""AWD-LSTM: a recurrent language model with dropout of everything (Merity et al., 2017, arXiv:1708.02182)."""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from lm_lightning.baselines.compat import lstm
from lm_lightning.baselines.network import CausalNetwork, check_settings, locked_dropout


class AWDLSTMConfig(PreTrainedConfig):
    """Settings of an AWD-LSTM.

    Args:
        vocab_size: Number of tokens.
        hidden_size: Size of embeddings, and of the last layer, whose outputs are compared with them.
        recurrent_size: Size of the other layers.
        num_hidden_layers: Number of layers.
        embedding_dropout: Share of the tokens of the vocabulary whose embeddings are dropped in a step, wherever they
            occur.
        input_dropout: Share of the units of embeddings that are dropped, the same ones at all positions.
        layer_dropout: The same for the outputs of all layers but the last.
        output_dropout: The same for the outputs of the last layer.
        weight_dropout: Share of the recurrent weights that are dropped in a step.
        initializer_range: Standard deviation of new embeddings.
        tie_word_embeddings: Whether the head has the weights of the embeddings.
        use_cache: Whether outputs have a state by default.
    """

    model_type = "awd_lstm"

    def __init__(
        self,
        vocab_size: int = 4096,
        hidden_size: int = 400,
        recurrent_size: int = 1150,
        num_hidden_layers: int = 3,
        embedding_dropout: float = 0.1,
        input_dropout: float = 0.4,
        layer_dropout: float = 0.25,
        output_dropout: float = 0.4,
        weight_dropout: float = 0.5,
        initializer_range: float = 0.05,
        tie_word_embeddings: bool = True,
        use_cache: bool = True,
        **options: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.recurrent_size = vocab_size, hidden_size, recurrent_size
        self.num_hidden_layers = num_hidden_layers
        self.embedding_dropout, self.input_dropout = embedding_dropout, input_dropout
        self.layer_dropout, self.output_dropout, self.weight_dropout = layer_dropout, output_dropout, weight_dropout
        self.initializer_range, self.use_cache = initializer_range, use_cache
        dropouts = ("embedding_dropout", "input_dropout", "layer_dropout", "output_dropout", "weight_dropout")
        check_settings(self, ("num_hidden_layers",), dropouts)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **options)


class LSTMLayer(GradientCheckpointingLayer):
    """A layer of an LSTM with weight dropout.

    Args:
        inputs: Number of inputs.
        units: Number of units.
        weight_dropout: Share of the recurrent weights that are dropped in a step.
    """

    def __init__(self, inputs: int, units: int, weight_dropout: float) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.empty(4 * units, inputs))
        self.weight_hh = nn.Parameter(torch.empty(4 * units, units))
        self.bias = nn.Parameter(torch.empty(4 * units))
        self.units, self.weight_dropout = units, weight_dropout

    def reset_weights(self) -> None:
        """Gives the layer new weights: those of `torch.nn.LSTM`, but with forget gates that are open at first."""
        for weight in (self.weight_ih, self.weight_hh):
            init.uniform_(weight, -(self.units**-0.5), self.units**-0.5)
        init.copy_(self.bias, torch.eye(4)[1].repeat_interleave(self.units))  # gates: input, forget, cell, output

    def forward(
        self, inputs: Tensor, lengths: Optional[Tensor], hidden: Tensor, cell: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs, (B, T, H), and the hidden and cell state after them, (B, H) each; see `compat.lstm`."""
        weight_hh = F.dropout(self.weight_hh, self.weight_dropout, self.training)
        weights = [self.weight_ih, weight_hh, self.bias, torch.zeros_like(self.bias)]
        outputs, (hidden, cell) = lstm(
            inputs, lengths, (hidden.unsqueeze(0), cell.unsqueeze(0)), weights, torch.is_grad_enabled()
        )
        return outputs, hidden.squeeze(0), cell.squeeze(0)


class AWDLSTM(nn.Module):
    """Embeddings and layers; see `CausalNetwork`."""

    def __init__(self, config: AWDLSTMConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        sizes = [config.hidden_size] + [config.recurrent_size] * (config.num_hidden_layers - 1) + [config.hidden_size]
        self.layers = nn.ModuleList(LSTMLayer(i, o, config.weight_dropout) for i, o in zip(sizes, sizes[1:]))
        self.norm = nn.LayerNorm(config.hidden_size)  # else, small outputs make embeddings learn slowly

    def forward(
        self, tokens: Tensor, lengths: Optional[Tensor], state: Optional[tuple[Tensor, ...]]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The state has the hidden and the cell state of each layer."""
        config, weight = self.config, self.embed_tokens.weight
        if self.training and config.embedding_dropout:
            weight = weight * F.dropout(torch.ones_like(weight[:, :1]), config.embedding_dropout)
        outputs = F.embedding(tokens, weight) * config.hidden_size**0.5  # else, gates would hardly depend on them
        outputs = locked_dropout(outputs, config.input_dropout, self.training)
        new: list[Tensor] = []
        layer: Any
        for number, layer in enumerate(self.layers):
            if state is None:
                hidden = cell = outputs.new_zeros(len(tokens), layer.units)
            else:
                hidden, cell = state[2 * number : 2 * number + 2]
            outputs, hidden, cell = layer(outputs, lengths, hidden, cell)
            if number < len(self.layers) - 1:
                outputs = locked_dropout(outputs, config.layer_dropout, self.training)
            new += [hidden, cell]
        return locked_dropout(self.norm(outputs), config.output_dropout, self.training), tuple(new)


class AWDLSTMForCausalLM(CausalNetwork):
    """An AWD-LSTM that predicts the next token."""

    config_class = AWDLSTMConfig
    _no_split_modules = ["LSTMLayer"]

    def __init__(self, config: AWDLSTMConfig) -> None:
        super().__init__(config, AWDLSTM(config))
