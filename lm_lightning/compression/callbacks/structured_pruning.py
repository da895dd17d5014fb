"""Structured pruning: gradually disables units, heads or blocks in training, and exports the network without them."""

from pathlib import Path
from typing import Any, Literal, Optional

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lm_lightning.compression import structure
from lm_lightning.compression.callbacks.pruning import Pruning
from lm_lightning.compression.importance import observe_blocks, smallest
from lm_lightning.errors import UserError
from lm_lightning.linear_layers.blocks import by_rows, linear_layers
from lm_lightning.models.export import ChangesExport
from lm_lightning.networks import blocks


class StructuredPruning(ChangesExport, Pruning):
    """Gradually removes units, heads or blocks of a network, while training compensates for them.

    In training, their outputs are set to zero, with the schedule of `Pruning`; once removed, they stay removed. The
    exported model is smaller, as with the recipes of `compress` with the same names, and computes the same outputs.

    Args:
        kind: What is removed. `width`: units of the feed-forward layers. `heads`: attention heads, together with those
            that share their keys and values, in networks whose config has a head_dim (Llama, Qwen). `layers`: blocks,
            in networks that add the output of a block to its input, with norms at the inputs (GPT, Llama).
        keep: Fraction to keep.
        method: Importance of units and heads. `magnitude`: the magnitude of their weights. `wanda`: their contribution
            to the next layer. The importance of a block is how much it changes its input (Men et al., 2024,
            arXiv:2403.03853).
        start: Number of optimizer steps before the first ones are removed.
        end: Optimizer step from which only the fraction `keep` is left. Default: half of the run.
        frequency: Number of optimizer steps after which more are removed.
        table: See `Pruning`.
    """

    def __init__(
        self,
        kind: structure.Kind = "width",
        keep: float = 0.5,
        method: Literal["magnitude", "wanda"] = "wanda",
        start: int = 0,
        end: Optional[int] = None,
        frequency: int = 50,
        table: bool = True,
    ) -> None:
        if not 0 < keep < 1:
            raise UserError(f"keep of the structured pruning is {keep}, but must be above 0 and below 1")
        method = "wanda" if kind == "layers" else method  # blocks are always measured
        super().__init__(1 - keep, method, start=start, end=end, frequency=frequency, table=table)
        self.kind: structure.Kind = kind
        self.keep = keep
        self.kept: list[Tensor] = []  # indices of the units or heads of each block; for `layers`, one tensor

    def layers_of(self, network: Any) -> dict[str, nn.Linear]:
        """The layers whose inputs are the units; for `layers`, those whose outputs are added to a block's input."""
        if self.kind == "layers":
            self.ends = [last_layers(network, block) for block in blocks(network)]
            return {name: layer for block in self.ends for name, layer in block.items()}
        self.units = structure.units(network, self.kind)
        return {block.out: block.layer for block in self.units}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network = pl_module.network
        structure.Structure(self.kind).check(network, self.keep, ())
        super().on_fit_start(trainer, pl_module)
        self.number = self.units[0].number if self.kind != "layers" else len(self.ends)
        self.sparsity = 1 - structure.number_to_keep(network, self.kind, self.keep) / self.number
        if self.kind == "layers" and not passes_through(network, blocks(network)[0], self.ends[0]):
            raise UserError(
                f"the blocks of {type(network).__name__} cannot be removed in training, since their sums are followed "
                "by norms: remove blocks with compress --recipe layers=..., and train the result"
            )

    def watch(self, network: Any) -> list[Any]:
        """Registers hooks that measure the inputs of the next layers, or how much blocks change, in training."""
        if self.kind != "layers":
            return super().watch(network)
        return observe_blocks(blocks(network), self.add, training_only=True)

    @torch.no_grad()
    def choose(self, pl_module: LightningModule) -> None:
        """Chooses which units, heads or blocks are removed from now on."""
        share = self.share(self.step)
        if self.kind == "layers":
            sums = self.over_processes()
            changes = torch.stack([sums[f"block {number}"] for number in range(self.number)])
            if self.kept:
                changes[[n for n in range(self.number) if n not in self.kept[0].tolist()]] = 0
            gone = smallest(changes, share)
            self.kept = [(~gone).nonzero().flatten().cpu()]
            self.masks = {name: ~gone[number] for number, block in enumerate(self.ends) for name in block}
        else:
            norms = self.norms() if self.method == "wanda" else None
            self.kept, self.masks = [], {}
            for block in self.units:
                gone = smallest(block.importance(norms), share)
                self.kept.append((~gone).nonzero().flatten().cpu())
                inputs = by_rows(block.layer, block.layer.weight).shape[1] // block.number  # inputs per unit
                self.masks[block.out] = by_rows(block.layer, (~gone).repeat_interleave(inputs).unsqueeze(0))
        pl_module.log("train/sparsity", share)

    @torch.no_grad()
    def apply(self) -> None:
        """Sets their outputs to zero."""
        super().apply()
        if self.kind == "layers" and self.kept:
            for number, block in enumerate(self.ends):
                for layer in block.values():
                    if number not in self.kept[0].tolist() and layer.bias is not None:
                        layer.bias.zero_()

    def report(self, pl_module: LightningModule) -> None:
        """Prints how many are kept."""
        kept = len(self.kept[0]) if self.kept else self.number
        what = {"width": "units of each block", "heads": "heads of each block", "layers": "blocks"}[self.kind]
        pl_module.print(f"pruned: {kept} of {self.number} {what} are kept ({kept / self.number:.1%})")

    @classmethod
    def change_export(cls, folder: Path, state: dict[str, Any]) -> None:
        """Removes them from the exported model."""
        structure.shrink(folder, state["kind"], state["kept"])

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"kind": self.kind, "kept": self.kept}

    def made_with(self) -> dict[str, Any]:
        return {"kind": self.kind, "method": self.method}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.kept = state["kept"]


def last_layers(network: Any, block: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that end a block's attention and its feed-forward part, by their names."""
    names = {id(module): name for name, module in network.named_modules()}
    linear = {n: layer for n, layer in linear_layers(network).items() if n.startswith(f"{names[id(block)]}.")}
    (out,) = (own for own in structure.units(network, "width") if own.out in linear)
    attention = [name for name in linear if "attn" in name or "attention" in name]
    if not attention:
        raise UserError(
            f"{type(network).__name__} has no linear layer with attention in its name: use the kind width or heads"
        )
    return {attention[-1]: linear[attention[-1]], out.out: out.layer}


@torch.no_grad()
def passes_through(network: Any, block: nn.Module, ends: dict[str, nn.Linear]) -> bool:
    """Tests whether the output of a block is its input if the last layers of its two parts return zeros."""
    same: list[bool] = []

    def compare(module: nn.Module, inputs: tuple, output: Any) -> None:
        same.append(torch.allclose(inputs[0], output[0] if isinstance(output, tuple) else output, atol=1e-6))

    hooks = [layer.register_forward_hook(lambda module, inputs, output: output * 0) for layer in ends.values()]
    hooks.append(block.register_forward_hook(compare))
    # A norm with its initial weights would not change an input that is already normalized.
    hooks.append(block.register_forward_pre_hook(lambda module, inputs: (3 * inputs[0] + 1, *inputs[1:])))
    training = network.training
    network.eval()(torch.arange(8, device=network.device).unsqueeze(0))
    network.train(training)
    for hook in hooks:
        hook.remove()
    return all(same)
