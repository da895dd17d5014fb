"""Pruning: weights of little importance become zeros in the course of a training, which makes up for them."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Optional

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from lm_lightning.compression.callbacks.after_training import compress_alone
from lm_lightning.errors import UserError
from lm_lightning.networks import by_rows, linear_layers, smallest, zeros_of


class Pruning(Callback):
    """Makes a share of the weights of a network's blocks zero, little by little, and keeps them so.

    After each optimizer step the pruned weights are zero again. Which they are is in the checkpoint, so that a resumed
    run goes on exactly. The share grows as by Zhu and Gupta (2017, arXiv:1710.01878), fast at first.

    Args:
        sparsity: Share of zeros at the end.
        method: What tells the importance of a weight: its `magnitude`; with `wanda`, that times the norm of its input
            (Sun et al., 2023, arXiv:2306.11695), compared within an output; with `movement`, how far training moves it
            away from zero (Sanh et al., 2020, arXiv:2005.07683).
        pattern: `2:4` makes two of four inputs in a row zero, which GPUs compute faster; at once, at `start`.
        scope: Whether every layer has the same share, `local`, or all layers together, `global`.
        modules: Patterns of the names of the layers, such as `*mlp*`. Default: all linear layers of the blocks.
        start: Optimizer steps before the first zeros.
        end: Optimizer step from which the share is `sparsity`. Default: half of the run.
        frequency: Steps from one choice of weights to the next.
        table: Whether to measure size, speed, loss and metrics when training has ended, and if it began with pretrained
            weights, those of before, see `compress`.
    """

    def __init__(
        self,
        sparsity: float = 0.5,
        method: Literal["magnitude", "wanda", "movement"] = "magnitude",
        pattern: Literal["free", "2:4"] = "free",
        scope: Literal["local", "global"] = "local",
        modules: Sequence[str] = (),
        start: int = 0,
        end: Optional[int] = None,
        frequency: int = 50,
        table: bool = True,
    ) -> None:
        if not 0 < sparsity < 1:
            raise UserError(f"the pruning's sparsity is {sparsity}, but must be between 0 and 1, without both")
        if frequency < 1 or start < 0 or (end is not None and end < start):
            raise UserError(
                f"the pruning has start {start}, end {end} and frequency {frequency}, but must have 0 <= start <= end "
                "and a frequency of 1 or more"
            )
        if pattern == "2:4" and (sparsity != 0.5 or scope == "global"):
            raise UserError(
                "the pruning's pattern 2:4 has a sparsity of 0.5 in each layer: leave sparsity and scope out"
            )
        if method == "wanda" and scope == "global":
            raise UserError("the pruning's method wanda compares the weights of an output: leave scope out")
        self.sparsity, self.method, self.pattern, self.scope = sparsity, method, pattern, scope
        self.patterns, self.start, self.end, self.frequency = modules, start, end, frequency
        self.table = table
        self.layers: dict[str, nn.Linear] = {}
        self.masks: dict[str, Tensor] = {}  # what is kept
        self.importance: dict[str, Tensor] = {}  # squared norms of inputs, or movements; summed up since the start
        self.step = 0
        self.hooks: list[Any] = []

    # Schedule

    @property
    def complete_from(self) -> int:
        """The step from which the network is pruned as far as it will be."""
        return self.last

    def share(self, step: int) -> float:
        """The share of zeros after an optimizer step."""
        if step < self.start:
            return 0.0
        if self.pattern == "2:4" or step >= self.last:
            return self.sparsity
        return self.sparsity * (1 - (1 - (step - self.start) / (self.last - self.start)) ** 3)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise UserError(
                "pruning needs whole weights in each process: take --trainer.strategy ddp, or prune the finished model "
                "with python -m lm_lightning compress"
            )
        if pl_module.adapter is not None:
            raise UserError(
                "pruning changes the weights that model.adapter leaves as they are: leave one of the two out"
            )
        total = pl_module.total_steps()
        if self.end is None and total == float("inf"):
            raise UserError("the pruning needs to know its end: set its end, or trainer.max_steps")
        self.last = self.end if self.end is not None else max(self.start, int(total) // 2)
        if self.last > total:
            raise UserError(f"the pruning ends at step {self.last}, but the run at step {total:.0f}: lower its end")
        self.layers = self.layers_of(pl_module.network)
        odd = [name for name, layer in self.layers.items() if by_rows(layer, layer.weight).shape[1] % 4]
        if self.pattern == "2:4" and odd:
            raise UserError(f"{odd[0]} has no multiple of 4 inputs, which the pattern 2:4 needs: leave it out")

    def layers_of(self, network: Any) -> dict[str, nn.Linear]:
        """The layers whose weights are pruned, by their names."""
        return linear_layers(network, self.patterns)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step, self.processes = trainer.global_step, trainer.world_size
        self.reduce = partial(trainer.strategy.reduce, reduce_op="sum")
        for tensors in (self.masks, self.importance):
            for name in tensors:
                tensors[name] = tensors[name].to(pl_module.device)
        if self.method == "wanda":
            self.hooks = self.watch(pl_module.network)

    def watch(self, network: Any) -> list[Any]:
        """Hooks that measure what importance is told by, in training."""
        return [layer.register_forward_pre_hook(self.measure(name)) for name, layer in self.layers.items()]

    def measure(self, name: str) -> Any:
        """A hook that adds up the squares of a layer's inputs."""

        @torch.no_grad()
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if layer.training:
                squares = inputs[0].detach().float().flatten(0, -2).square().sum(0)
                self.importance[name] = self.importance[name] + squares if name in self.importance else squares

        return hook

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.method == "movement":
            for name, layer in self.layers.items():
                movement = -(layer.weight * layer.weight.grad)  # type: ignore[operator]
                self.importance[name] = self.importance[name] + movement if name in self.importance else movement

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self.step:  # amid an accumulation
            return
        self.step = step
        due = not self.masks or (step - self.start) % self.frequency == 0 or step == self.last
        if due and self.start <= step <= self.last and not (self.pattern == "2:4" and self.masks):
            self.choose(pl_module)
        self.apply()

    # Weights

    @torch.no_grad()
    def scores(self) -> dict[str, Tensor]:
        """The importance of each weight, in the shapes of the weights; the same in all processes."""
        if self.method == "movement":  # of gradients, which are of all processes
            return self.importance
        scores = {name: layer.weight.abs().float() for name, layer in self.layers.items()}
        if self.method == "wanda":
            squares = self.of_all_processes()
            scores = {
                n: by_rows(self.layers[n], by_rows(self.layers[n], s) * squares[n].sqrt()) for n, s in scores.items()
            }
        return scores

    def of_all_processes(self) -> dict[str, Tensor]:
        """The squared norms of the inputs of all processes."""
        return {name: self.reduce(squares) for name, squares in self.importance.items()}

    @torch.no_grad()
    def choose(self, pl_module: LightningModule) -> None:
        """Chooses which weights are zero from now on."""
        share, scores = self.share(self.step), self.scores()
        if self.pattern == "2:4":
            zero = {
                name: by_rows(layer, smallest(by_rows(layer, scores[name]).unflatten(1, (-1, 4)), 0.5).flatten(1))
                for name, layer in self.layers.items()
            }
        elif self.method == "wanda":
            zero = {
                name: by_rows(layer, smallest(by_rows(layer, scores[name]), share))
                for name, layer in self.layers.items()
            }
        elif self.scope == "global":
            together = smallest(torch.cat([score.flatten() for score in scores.values()]), share)
            parts = together.split([score.numel() for score in scores.values()])
            zero = {name: part.view_as(scores[name]) for name, part in zip(scores, parts)}
        else:
            zero = {name: smallest(score.flatten(), share).view_as(score) for name, score in scores.items()}
        self.masks = {name: ~mask for name, mask in zero.items()}
        pl_module.log("train/sparsity", share)

    @torch.no_grad()
    def apply(self) -> None:
        """Makes the pruned weights zero."""
        for name, mask in self.masks.items():
            self.layers[name].weight.mul_(mask)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for hook in self.hooks:
            hook.remove()
        self.apply()
        self.report(pl_module)

    def report(self, pl_module: LightningModule) -> None:
        """Tells how much is zero."""
        zeros, weights = zeros_of(self.layers)
        pl_module.print(
            f"pruned: {zeros:,} of {weights:,} weights in {len(self.layers)} layers are zero ({zeros / weights:.1%})"
        )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run = Path(trainer.default_root_dir)
        if not self.table or not trainer.is_global_zero or trainer.fast_dev_run or not (run / "model").exists():
            return
        flags = ["--config", str(run / "config.yaml")]  # named, so that classes of the user's are imported again
        if pl_module.pretrained is None:
            compress_alone(run, "--recipe", "none", *flags)
        else:
            flags += ["--output", str(run / "compressed")]
            compress_alone(Path(pl_module.pretrained_folder()), "--recipe", "none", "--beside", f"[{run}]", *flags)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        importance = self.importance
        if self.method == "wanda" and self.processes > 1:  # so that each may go on with an equal part of it
            importance = {name: squares / self.processes for name, squares in self.of_all_processes().items()}
        return {"masks": self.masks, "importance": importance, "made_with": self.made_with()}

    def made_with(self) -> dict[str, Any]:
        """The options that the masks and importances fit alone; the others may change on a resume."""
        return {"method": self.method, "pattern": self.pattern, "scope": self.scope, "modules": list(self.patterns)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in self.made_with().items():
            if (saved := state["made_with"].get(name)) != value:
                raise UserError(
                    f"the checkpoint was made with {type(self).__name__}.{name} {saved} (here {value}), and fits only "
                    "that: use the old value, or start a new run from the weights with --model.pretrained RUN/model"
                )
        self.masks, self.importance = dict(state["masks"]), dict(state["importance"])
