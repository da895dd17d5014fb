"""Pruning: sets weights of low importance to zero during training, which compensates for the loss."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Optional

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lm_lightning.compression.callbacks.after_training import compress_alone
from lm_lightning.compression.importance import (
    Pattern,
    check_pattern,
    least_important,
    observe_inputs,
    smallest,
    weight_scores,
)
from lm_lightning.compression.sparsity import count_zeros
from lm_lightning.errors import UserError
from lm_lightning.linear_layers.blocks import by_rows, linear_layers
from lm_lightning.strategies.capabilities import capabilities


class Pruning(Callback):
    """Gradually sets a fraction of the weights of a network's blocks to zero.

    The pruned weights are set to zero again after each optimizer step. Checkpoints contain the masks, so that a resumed
    run continues exactly. The sparsity increases as in Zhu and Gupta (2017, arXiv:1710.01878), fast at first.

    Args:
        sparsity: Fraction of zeros at the end.
        method: Importance of a weight. `magnitude`: its magnitude. `wanda`: its magnitude times the norm of its input,
            compared within an output (Sun et al., 2023, arXiv:2306.11695). `movement`: how far training moves it away
            from zero (Sanh et al., 2020, arXiv:2005.07683).
        pattern: `2:4` sets two of each four adjacent inputs to zero, all at once, at `start`; GPUs compute this
            pattern faster.
        scope: Whether the sparsity applies to each layer (`local`) or to all layers together (`global`).
        modules: Patterns of the names of the layers, such as `*mlp*`. Default: all linear layers of the blocks.
        start: Number of optimizer steps before the first weights are pruned.
        end: Optimizer step from which the final sparsity is reached. Default: half of the run.
        frequency: Number of optimizer steps after which weights are chosen again.
        table: Whether to measure size, speed, loss and metrics of the model at the end of training and, if training
            started from pretrained weights, of these; see `compress`.
    """

    def __init__(
        self,
        sparsity: float = 0.5,
        method: Literal["magnitude", "wanda", "movement"] = "magnitude",
        pattern: Pattern = "free",
        scope: Literal["local", "global"] = "local",
        modules: Sequence[str] = (),
        start: int = 0,
        end: Optional[int] = None,
        frequency: int = 50,
        table: bool = True,
    ) -> None:
        if not 0 < sparsity < 1:
            raise UserError(f"the pruning's sparsity is {sparsity}, but must be above 0 and below 1")
        if frequency < 1 or start < 0 or (end is not None and end < start):
            raise UserError(
                f"the pruning has start {start}, end {end} and frequency {frequency}, but must have 0 <= start <= end "
                "and a frequency of 1 or more"
            )
        if pattern == "2:4" and (sparsity != 0.5 or scope == "global"):
            raise UserError("the pruning's pattern 2:4 has a sparsity of 0.5 in each layer: omit sparsity and scope")
        if method == "wanda" and scope == "global":
            raise UserError("the pruning's method wanda compares the weights of an output: omit scope")
        self.sparsity, self.method, self.scope = sparsity, method, scope
        self.pattern: Pattern = pattern
        self.patterns, self.start, self.end, self.frequency = modules, start, end, frequency
        self.table = table
        self.layers: dict[str, nn.Linear] = {}
        self.masks: dict[str, Tensor] = {}  # True for weights that are kept
        self.importance: dict[str, Tensor] = {}  # sums of squared inputs, or of movements, since the start
        self.step = 0
        self.hooks: list[Any] = []

    # Schedule

    @property
    def complete_from(self) -> int:
        """The step from which the network has its final sparsity."""
        return self.last

    def share(self, step: int) -> float:
        """The fraction of zeros after an optimizer step."""
        if step < self.start:
            return 0.0
        if self.pattern == "2:4" or step >= self.last:
            return self.sparsity
        return self.sparsity * (1 - (1 - (step - self.start) / (self.last - self.start)) ** 3)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if capabilities(trainer.strategy).shards_parameters:
            raise UserError(
                "pruning needs all weights in each process: use --trainer.strategy ddp, or prune the finished model "
                "with python -m lm_lightning compress"
            )
        if pl_module.adapter is not None:
            raise UserError("pruning changes the weights that model.adapter freezes: omit one of the two")
        total = pl_module.total_steps()
        if self.end is None and total == float("inf"):
            raise UserError("the end of the pruning is unknown: set its option end, or trainer.max_steps")
        self.last = self.end if self.end is not None else max(self.start, int(total) // 2)
        if self.last > total:
            raise UserError(f"the pruning ends at step {self.last}, but the run at step {total:.0f}: lower its end")
        self.layers = self.layers_of(pl_module.network)
        check_pattern(self.pattern, self.layers)

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
        """Registers hooks that measure the inputs of the layers in training."""
        return observe_inputs(self.layers, self.add, training_only=True)

    def add(self, name: str, total: Tensor, count: int = 0) -> None:
        """Adds to the sums from which the importance is computed."""
        self.importance[name] = self.importance[name] + total if name in self.importance else total

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.method == "movement":
            for name, layer in self.layers.items():
                self.add(name, -(layer.weight * layer.weight.grad))  # type: ignore[operator]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self.step:  # gradients are still being accumulated
            return
        self.step = step
        due = not self.masks or (step - self.start) % self.frequency == 0 or step == self.last
        if due and self.start <= step <= self.last and not (self.pattern == "2:4" and self.masks):
            self.choose(pl_module)
        self.apply()

    # Weights

    @torch.no_grad()
    def scores(self) -> dict[str, Tensor]:
        """The importance of each weight of a layer, (outputs, inputs), by its name; the same in all processes."""
        if self.method == "movement":  # computed from gradients, which are the same in all processes
            return {name: by_rows(self.layers[name], movement) for name, movement in self.importance.items()}
        norms = self.norms() if self.method == "wanda" else {}
        return {name: weight_scores(layer, norms.get(name)) for name, layer in self.layers.items()}

    def norms(self) -> dict[str, Tensor]:
        """The norms of the inputs of each layer, (inputs,), over all processes."""
        return {name: squares.sqrt() for name, squares in self.over_processes().items()}

    def over_processes(self) -> dict[str, Tensor]:
        """The measured sums, over all processes."""
        return {name: self.reduce(total) for name, total in self.importance.items()}

    @torch.no_grad()
    def choose(self, pl_module: LightningModule) -> None:
        """Chooses which weights are zero from now on."""
        share, scores = self.share(self.step), self.scores()
        if self.scope == "global":
            together = smallest(torch.cat([score.flatten() for score in scores.values()]), share)
            parts = together.split([score.numel() for score in scores.values()])
            zero = {name: part.view(scores[name].shape) for name, part in zip(scores, parts)}
        else:
            within_outputs = self.method == "wanda"
            zero = {n: least_important(score, share, self.pattern, within_outputs) for n, score in scores.items()}
        self.masks = {name: ~by_rows(self.layers[name], mask) for name, mask in zero.items()}
        pl_module.log("train/sparsity", share)

    @torch.no_grad()
    def apply(self) -> None:
        """Sets the pruned weights to zero."""
        for name, mask in self.masks.items():
            self.layers[name].weight.mul_(mask)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for hook in self.hooks:
            hook.remove()
        self.apply()
        self.report(pl_module)

    def report(self, pl_module: LightningModule) -> None:
        """Prints how many weights are zero."""
        zeros, weights = count_zeros(self.layers)
        pl_module.print(
            f"pruned: {zeros:,} of {weights:,} weights in {len(self.layers)} layers are zero ({zeros / weights:.1%})"
        )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run = Path(trainer.default_root_dir)
        if not self.table or not trainer.is_global_zero or trainer.fast_dev_run or not (run / "model").exists():
            return
        flags = ["--config", str(run / "config.yaml")]  # given explicitly, so that the user's own classes are imported
        if pl_module.pretrained is None:
            compress_alone(run, "--recipe", "none", *flags)
        else:
            flags += ["--output", str(run / "compressed")]
            compress_alone(Path(pl_module.pretrained_folder()), "--recipe", "none", "--beside", f"[{run}]", *flags)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        importance = self.importance
        if self.method == "wanda" and self.processes > 1:  # each process resumes with an equal part of the sums
            importance = {name: squares / self.processes for name, squares in self.over_processes().items()}
        return {"masks": self.masks, "importance": importance, "made_with": self.made_with()}

    def made_with(self) -> dict[str, Any]:
        """The options that a resumed run must not change, since masks and importance depend on them."""
        return {"method": self.method, "pattern": self.pattern, "scope": self.scope, "modules": list(self.patterns)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in self.made_with().items():
            if (saved := state["made_with"].get(name)) != value:
                raise UserError(
                    f"the checkpoint was made with {type(self).__name__}.{name} {saved}, not {value}, and its masks "
                    f"are only valid for {saved}: use {saved}, or start a new run from the weights with "
                    "--model.pretrained RUN/model"
                )
        self.masks, self.importance = dict(state["masks"]), dict(state["importance"])
