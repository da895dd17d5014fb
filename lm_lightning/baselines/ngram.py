"""An n-gram model as a network of `transformers`: tables of probabilities, which are looked up."""

from collections.abc import Iterator, Sequence
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from lm_lightning.baselines.counts import MAX_ORDER
from lm_lightning.baselines.kneser_ney import Tables
from lm_lightning.baselines.network import CausalOutput, OwnNetwork
from lm_lightning.baselines.segments import places


class NGramConfig(PreTrainedConfig):
    """Settings of an n-gram model.

    Args:
        vocab_size: Number of tokens.
        order: Maximum number of tokens of an n-gram: a token depends on the `order - 1` tokens before it.
        sizes: Number of n-grams of 2, 3, ..., `order` tokens, which counting determines.
        use_cache: Without effect.
    """

    model_type = "ngram"

    def __init__(
        self,
        vocab_size: int = 4096,
        order: int = 5,
        sizes: Sequence[int] = (),
        use_cache: bool = True,
        **options: Any,
    ) -> None:
        if not 2 <= order <= MAX_ORDER:
            raise ValueError(f"order is {order}, but must be between 2 and {MAX_ORDER}")
        self.vocab_size, self.order, self.use_cache = vocab_size, order, use_cache
        self.sizes = list(sizes) or [0] * (order - 1)
        super().__init__(**options | {"tie_word_embeddings": False})


class NGramForCausalLM(OwnNetwork):
    """Probabilities of the next token after up to `order - 1` tokens, see `kneser_ney`.

    Without counts, all tokens are equally probable. Logits are log-probabilities.
    """

    config_class = NGramConfig
    base_model_prefix = ""

    def __init__(self, config: NGramConfig) -> None:
        super().__init__(config)
        self.unigrams = nn.Embedding(config.vocab_size, 1)  # probabilities
        self.resize(config.sizes)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.unigrams

    def resize_token_embeddings(self, *args: Any, **options: Any) -> Any:
        """An n-gram model has no probabilities for other tokens than those that it has counted.

        Raises:
            ValueError: Always.
        """
        raise ValueError("an n-gram model cannot get more tokens: count the text with the new tokenizer")

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.unigrams:
            init.constant_(module.weight, 1 / self.config.vocab_size)
        elif module is self:
            for level, *_ in self.levels():
                init.ones_(self.get_buffer(f"shares_{level - 1}"))

    def resize(self, sizes: Sequence[int]) -> None:
        """Makes room for n-grams of 2, 3, ... tokens, without values.

        Args:
            sizes: Their numbers.
        """
        self.config.sizes = list(sizes)
        for level, size, parents in zip(range(2, self.config.order + 1), sizes, [self.config.vocab_size, *sizes]):
            self.register_buffer(f"keys_{level}", torch.zeros(size, dtype=torch.int64))
            self.register_buffer(f"own_{level}", torch.zeros(size))
            self.register_buffer(f"shares_{level - 1}", torch.ones(parents))

    @torch.no_grad()
    def set_tables(self, tables: Tables) -> None:
        """Sets the probabilities; those of n-grams stay where they are, such as on disk."""
        self.config.sizes = [len(keys) for keys in tables.keys]
        self.unigrams.weight.copy_(torch.from_numpy(tables.unigrams).unsqueeze(1))
        for level, *arrays in zip(range(2, self.config.order + 1), tables.keys, tables.own, tables.shares):
            for name, array in zip((f"keys_{level}", f"own_{level}", f"shares_{level - 1}"), arrays):
                setattr(self, name, torch.from_numpy(array).to(self.device))

    def levels(self) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """For each number of tokens from 2: this number, keys and own parts of n-grams, shares of their contexts."""
        for n in range(2, self.config.order + 1):
            yield n, self.get_buffer(f"keys_{n}"), self.get_buffer(f"own_{n}"), self.get_buffer(f"shares_{n - 1}")

    def lookup(self, keys: Tensor, parents: Tensor, tokens: Tensor) -> Tensor:
        """The numbers of n-grams, (M,) int64; -1 for those that do not exist.

        Args:
            keys: Keys of n-grams of this length, ascending.
            parents: Number of the first tokens of each n-gram, (M,) int64; -1 if they do not exist.
            tokens: Last token of each n-gram, (M,) int64.
        """
        if not len(keys):
            return torch.full_like(parents, -1)
        wanted = parents * self.config.vocab_size + tokens
        found = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        return torch.where((keys[found] == wanted) & (parents >= 0), found, -1)

    def contexts(self, context: Tensor, known: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """For 1, 2, ... tokens of context: the numbers of contexts, -1 for none, (M,); keys and own parts; shares.

        Args:
            context: Last tokens, (M, order - 1) int64.
            known: How many of them, at the end, are known, (M,) int64.
        """
        all_keys = [keys for _, keys, _, _ in self.levels()]
        for n, keys, own, shares in self.levels():
            tokens = context[:, context.shape[1] - (n - 1) :]
            number = torch.where(known >= n - 1, tokens[:, 0], -1)
            for place in range(1, n - 1):
                number = self.lookup(all_keys[place - 1], number, tokens[:, place])
            yield number, keys, own, shares

    def probabilities_of(self, context: Tensor, known: Tensor, targets: Tensor) -> Tensor:
        """The probabilities of targets, (M,) int64, after contexts, see `contexts`: (M,) float32."""
        result = self.unigrams.weight[targets, 0]
        for number, keys, own, shares in self.contexts(context, known):
            index = self.lookup(keys, number, targets)
            result = result * pick(shares, number, 1.0) + pick(own, index, 0.0)
        return result

    def probabilities(self, context: Tensor, known: Tensor) -> Tensor:
        """The probabilities of all tokens after contexts, see `contexts`: (M, V) float32."""
        result = self.unigrams.weight[:, 0].repeat(len(context), 1)
        for number, keys, own, shares in self.contexts(context, known):
            result *= pick(shares, number, 1.0).unsqueeze(1)
            first, end = (torch.searchsorted(keys, (number + i) * self.config.vocab_size) for i in (0, 1))
            counts = torch.where(number >= 0, end - first, 0)
            rows = torch.repeat_interleave(counts)  # the row of each n-gram that begins with one of the contexts
            index = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows] + first[rows]
            result[rows, keys[index] % self.config.vocab_size] += own[index]
        return result

    def windows(
        self, input_ids: Tensor, position_ids: Optional[Tensor] = None, attention_mask: Optional[Tensor] = None
    ) -> tuple[Tensor, Tensor]:
        """The last tokens at each position, (B, T, order - 1), and how many belong to its document, (B, T)."""
        size = self.config.order - 1
        known = places(input_ids, position_ids, attention_mask) + 1
        return F.pad(input_ids, (size - 1, 0)).unfold(1, size, 1), known.clamp(max=size)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Optional[Tensor] = None,
        position_ids: Optional[Tensor] = None,
        labels: Optional[Tensor] = None,
        logits_to_keep: int = 0,
        return_dict: Optional[bool] = None,
        **options: Any,
    ) -> Union[CausalOutput, tuple]:
        """Computes log-probabilities; the arguments are those of `network.CausalNetwork`.

        As there, documents and padding are not part of each other's context.
        """
        windows, known = self.windows(input_ids, position_ids, attention_mask)
        if logits_to_keep:
            windows, known = windows[:, -logits_to_keep:], known[:, -logits_to_keep:]
        logits = self.probabilities(windows.flatten(0, 1), known.flatten()).log().view(*known.shape, -1)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        output = CausalOutput(loss=loss, logits=logits)
        return output if return_dict is not False else output.to_tuple()

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Optional[Tensor] = None, **options: Any
    ) -> dict[str, Any]:
        """The arguments of the next call of the network, in `generate`: the tokens on which the next one depends."""
        size = self.config.order - 1
        mask = None if attention_mask is None else attention_mask[:, -size:]
        return {"input_ids": input_ids[:, -size:], "attention_mask": mask, "logits_to_keep": 1}


def pick(table: Tensor, index: Tensor, default: float) -> Tensor:
    """The values of a table, (n,) float32, at each index, (M,) int64; the default where it is -1."""
    if not len(table):
        return torch.full(index.shape, default, device=index.device)
    return torch.where(index >= 0, table[index.clamp(min=0)], default)
