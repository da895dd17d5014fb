"""Gated convolutions (Dauphin et al., 2017, arXiv:1612.08083): each output depends on a fixed number of tokens."""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from lm_lightning.baselines.network import CausalNetwork, check_settings, locked_dropout


class GatedCNNConfig(PreTrainedConfig):
    """Settings of a network of gated convolutions.

    Args:
        vocab_size: Number of tokens.
        hidden_size: Size of embeddings and of all layers.
        num_hidden_layers: Number of layers.
        kernel_size: Number of positions that a layer sees: the position itself and those before it. An output of the
            network depends on `num_hidden_layers * (kernel_size - 1) + 1` tokens.
        dropout: Share of the units of embeddings and of each layer's outputs that are dropped, the same ones at all
            positions.
        initializer_range: Standard deviation of new embeddings.
        tie_word_embeddings: Whether the head has the weights of the embeddings.
        use_cache: Whether outputs have a state by default.
    """

    model_type = "gated_cnn"

    def __init__(
        self,
        vocab_size: int = 4096,
        hidden_size: int = 400,
        num_hidden_layers: int = 8,
        kernel_size: int = 4,
        dropout: float = 0.1,
        initializer_range: float = 0.05,
        tie_word_embeddings: bool = True,
        use_cache: bool = True,
        **options: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.kernel_size, self.dropout = kernel_size, dropout
        self.initializer_range, self.use_cache = initializer_range, use_cache
        check_settings(self, ("num_hidden_layers", "kernel_size"), ("dropout",))
        super().__init__(tie_word_embeddings=tie_word_embeddings, **options)


class GatedConvolution(GradientCheckpointingLayer):
    """A residual layer: the normalized inputs of the last positions, one linear map of them, times the gate of another.

    Layer normalization takes the place of the weight normalization of the paper.

    Args:
        units: Number of units.
        kernel_size: Number of positions that it sees.
        dropout: Share of the units of the output that are dropped.
    """

    def __init__(self, units: int, kernel_size: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(units)
        # A convolution as one matrix, which optimizers such as Muon and methods such as LoRA know how to change.
        self.convolution = nn.Linear(kernel_size * units, 2 * units)
        self.kernel_size, self.dropout = kernel_size, dropout

    def reset_weights(self) -> None:
        """Gives the convolution new weights."""
        init.normal_(self.convolution.weight, std=self.convolution.in_features**-0.5)
        init.zeros_(self.convolution.bias)

    def forward(self, inputs: Tensor, before: Optional[Tensor]) -> tuple[Tensor, Tensor]:
        """Outputs, (B, T, H), and the normalized inputs with the K - 1 before them, (B, K - 1 + T, H).

        Args:
            inputs: (B, T, H) float.
            before: The last K - 1 normalized inputs before these; None for zeros.
        """
        normed, size = self.norm(inputs), self.kernel_size - 1
        if before is None:
            before = normed.new_zeros(len(normed), size, normed.shape[2])
        seen = torch.cat([before, normed], dim=1)
        windows = torch.cat([seen[:, i : i + inputs.shape[1]] for i in range(self.kernel_size)], dim=2)
        outputs = inputs + locked_dropout(F.glu(self.convolution(windows), dim=2), self.dropout, self.training)
        return outputs, seen


class GatedCNN(nn.Module):
    """Embeddings and layers; see `CausalNetwork`."""

    def __init__(self, config: GatedCNNConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            GatedConvolution(config.hidden_size, config.kernel_size, config.dropout)
            for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(
        self, tokens: Tensor, lengths: Optional[Tensor], state: Optional[tuple[Tensor, ...]]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The state has the last K - 1 inputs of the convolution of each layer."""
        outputs = self.embed_tokens(tokens) * self.config.hidden_size**0.5  # about as large as outputs of the layers
        outputs = locked_dropout(outputs, self.config.dropout, self.training)
        size, new = self.config.kernel_size - 1, list[Tensor]()
        ends = torch.full((len(tokens),), tokens.shape[1]) if lengths is None else lengths
        last = ends.to(tokens.device).unsqueeze(1) + torch.arange(size, device=tokens.device)  # in `seen`
        for number, layer in enumerate(self.layers):
            outputs, seen = layer(outputs, None if state is None else state[number])
            new.append(seen.gather(1, last.unsqueeze(2).expand(-1, -1, seen.shape[2])))
        return self.norm(outputs), tuple(new)


class GatedCNNForCausalLM(CausalNetwork):
    """Gated convolutions that predict the next token."""

    config_class = GatedCNNConfig
    _no_split_modules = ["GatedConvolution"]

    def __init__(self, config: GatedCNNConfig) -> None:
        super().__init__(config, GatedCNN(config))
