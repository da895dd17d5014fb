"""Structured pruning of trained models: removes feed-forward units, attention heads or blocks."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional

import torch
import transformers
from torch import Tensor, nn

from lm_lightning.compression.calibration import Calibration
from lm_lightning.compression.folder import copy_other_files, load, save_as
from lm_lightning.errors import UserError
from lm_lightning.files import put
from lm_lightning.linear_layers.blocks import by_rows, linear_layers
from lm_lightning.networks import blocks

Kind = Literal["width", "heads", "layers"]


class Units(NamedTuple):
    """The removable units of a block: those between its feed-forward layers, or the heads of its attention.

    Heads that share keys and values are one unit.

    Attributes:
        number: Number of units.
        into: The layers that compute the units, by their names; each unit has the same number of adjacent outputs.
        out: The name of the layer that has the units as its inputs.
        layer: The layer with this name.
    """

    number: int
    into: dict[str, nn.Linear]
    out: str
    layer: nn.Linear

    def importance(self, norms: Optional[dict[str, Tensor]] = None) -> Tensor:
        """The importance of each unit, (number,) float32: the norm of its contribution to the next layer.

        Args:
            norms: Norms of the inputs of layers, see `calibration.Statistics`. Default: the norms of the weights that
                compute these inputs.
        """
        out = self.group(by_rows(self.layer, self.layer.weight).T)
        if norms is not None:
            return (out.norm(dim=2) * norms[self.out].to(out.device).view(self.number, -1)).norm(dim=1)
        importance = out.flatten(1).norm(dim=1)
        for layer in self.into.values():
            importance = importance * self.group(by_rows(layer, layer.weight)).flatten(1).norm(dim=1)
        return importance

    def group(self, rows: Tensor) -> Tensor:
        """Groups the rows of a weight by units: (number, rows of a unit, columns)."""
        return rows.unflatten(0, (self.number, -1))


def width_of(config: transformers.PreTrainedConfig) -> tuple[str, int]:
    """The name of a config's setting for the feed-forward width, and its value."""
    for key in ("n_inner", "intermediate_size", "ffn_dim", "hidden_dim"):
        if hasattr(config, key):
            return key, getattr(config, key) or 4 * config.hidden_size
    raise UserError(f"the feed-forward width of networks of type {config.model_type} is unknown: omit the recipe width")


def units(network: transformers.PreTrainedModel, kind: Kind) -> list[Units]:
    """The units of each block of a network.

    Args:
        network: A network of `transformers`.
        kind: `width` for the units between feed-forward layers, `heads` for attention heads.

    Raises:
        UserError: If `transformers` could not load the network with fewer units.
    """
    linear = linear_layers(network)
    names = {id(module): name for name, module in network.named_modules()}
    config, name = network.config, type(network).__name__
    found = []
    for block in blocks(network):
        own = {n: layer for n, layer in linear.items() if n.startswith(f"{names[id(block)]}.")}
        if kind == "width":
            number = width_of(config)[1]
            if number == config.hidden_size:
                raise UserError(
                    f"{name} has a feed-forward width of {number}, which is also its hidden size, so its feed-forward "
                    "layers cannot be distinguished from others: omit the recipe width"
                )
            into = {n: layer for n, layer in own.items() if by_rows(layer, layer.weight).shape[0] == number}
            out = {n: layer for n, layer in own.items() if by_rows(layer, layer.weight).shape[1] == number}
            if not into or len(out) != 1:
                raise UserError(
                    f"the blocks of {name} do not have layers with {number} outputs followed by one layer with "
                    f"{number} inputs: omit the recipe width"
                )
        else:
            number = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            into = {n: layer for n, layer in own.items() if n.endswith(("q_proj", "k_proj", "v_proj"))}
            out = {n: layer for n, layer in own.items() if n.endswith("o_proj")}
            if not hasattr(config, "head_dim") or len(into) != 3 or len(out) != 1:
                raise UserError(
                    f"transformers cannot load a {name} with fewer heads, since their size depends on their number: "
                    "omit the recipe heads, which needs a head_dim in the config (as in Llama and Qwen)"
                )
        found.append(Units(number, into, *next(iter(out.items()))))
    return found


def number_to_keep(network: transformers.PreTrainedModel, kind: Kind, share: float) -> int:
    """The number of units, heads or blocks to keep; for feed-forward units, a multiple of 8 for speed.

    Raises:
        UserError: If this number is all of them.
    """
    if kind == "width":
        number = width_of(network.config)[1]
        kept = max(8, round(share * number / 8) * 8)
    elif kind == "heads":
        number = getattr(network.config, "num_key_value_heads", None) or network.config.num_attention_heads
        kept = max(1, round(share * number))
    else:
        number = len(blocks(network))
        kept = max(1, round(share * number))
    if kept >= number:
        raise UserError(f"{kind}={share:g} keeps all {number} of {type(network).__name__}: use a smaller fraction")
    return kept


def prefix(network: transformers.PreTrainedModel) -> str:
    """The name of the list that contains a network's blocks."""
    all_blocks = blocks(network)
    names = {id(module): name for name, module in network.named_modules()}
    found = names[id(all_blocks[0])].rpartition(".")[0]
    if [names[id(block)] for block in all_blocks] != [f"{found}.{number}" for number in range(len(all_blocks))]:
        raise UserError(f"the blocks of {type(network).__name__} are not in a single list: omit the recipe layers")
    return found


class Structure:
    """Keeps the most important units, heads or blocks of a network.

    For units and heads, see `Units.importance`; the importance of a block is how much it changes its input. Without
    data, units and heads are compared by their weights alone, and blocks are kept at even distances, including the
    first and the last one (Sajjad et al., 2023, arXiv:2004.03844).

    Args:
        kind: What is removed: feed-forward units (`width`), attention `heads`, or blocks (`layers`).
    """

    def __init__(self, kind: Kind) -> None:
        self.kind: Kind = kind

    def check(self, network: transformers.PreTrainedModel, value: float, modules: Sequence[str]) -> None:
        """Refuses a network that this method cannot make smaller."""
        number_to_keep(network, self.kind, value)
        if self.kind == "layers":
            prefix(network)
        else:
            units(network, self.kind)

    @torch.no_grad()
    def __call__(
        self, source: Path, target: Path, value: float, calibration: Optional[Calibration], modules: Sequence[str]
    ) -> None:
        network = load(source)
        self.check(network, value, modules)
        kept = number_to_keep(network, self.kind, value)
        if self.kind == "layers":
            number = len(blocks(network))
            if calibration is not None:
                changes = torch.tensor(calibration(source).changes)
                chosen = changes.topk(kept).indices.sort().values
            else:
                chosen = torch.linspace(0, number - 1, kept).round().long()
            keep_blocks(network, chosen.tolist(), target)
        else:
            norms = calibration(source).norms if calibration is not None else None
            choices = [block.importance(norms).topk(kept).indices for block in units(network, self.kind)]
            keep_units(network, self.kind, choices, target)


@torch.no_grad()
def keep_units(network: transformers.PreTrainedModel, kind: Kind, chosen: list[Tensor], target: Path) -> None:
    """Writes a network with some of its units or heads.

    Args:
        network: The network with all of them.
        kind: `width` or `heads`.
        chosen: For each block, the indices of the units to keep; the same number for each block.
        target: Existing folder.
    """
    weights, kept = network.state_dict(), len(chosen[0])
    for block, choice in zip(units(network, kind), chosen):
        choice = choice.sort().values.to(block.layer.weight.device)
        for name, layer in block.into.items():
            rows = block.group(by_rows(layer, layer.weight))[choice].flatten(0, 1)
            weights[f"{name}.weight"] = by_rows(layer, rows).contiguous()
            if layer.bias is not None:
                weights[f"{name}.bias"] = block.group(layer.bias)[choice].flatten(0, 1)
        columns = block.group(by_rows(block.layer, block.layer.weight).T)[choice].flatten(0, 1).T
        weights[f"{block.out}.weight"] = by_rows(block.layer, columns).contiguous()
    config = network.config
    if kind == "width":
        changes = {width_of(config)[0]: kept}
    else:
        shared = config.num_attention_heads // units(network, kind)[0].number
        changes = {"num_attention_heads": kept * shared, "head_dim": config.head_dim}
        if hasattr(config, "num_key_value_heads"):
            changes["num_key_value_heads"] = kept
    save_as(network, changes, weights, target)


def shrink(folder: Path, kind: Kind, kept: list[Tensor]) -> None:
    """Removes units, heads or blocks from the model in a folder.

    Args:
        folder: `from_pretrained` folder.
        kind: What is removed.
        kept: For each block, the indices of the units or heads to keep; for `layers`, a single tensor with the indices
            of the blocks; empty to keep all.
    """
    if not kept:
        return
    network = load(folder)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        copy_other_files(folder, made)
        if kind == "layers":
            keep_blocks(network, kept[0].tolist(), made)
        else:
            keep_units(network, kind, kept, made)
        put(made, folder)


@torch.no_grad()
def keep_blocks(network: transformers.PreTrainedModel, chosen: list[int], target: Path) -> None:
    """Writes a network with some of its blocks, given by their indices, into an existing folder."""
    start, weights = prefix(network), {}
    for key, weight in network.state_dict().items():
        if key.startswith(f"{start}."):
            block, _, rest = key.removeprefix(f"{start}.").partition(".")
            if int(block) not in chosen:
                continue
            key = f"{start}.{chosen.index(int(block))}.{rest}"
        weights[key] = weight
    changes: dict[str, Any] = {"num_hidden_layers": len(chosen)}
    if getattr(network.config, "layer_types", None):
        changes["layer_types"] = [network.config.layer_types[block] for block in chosen]
    save_as(network, changes, weights, target)
