"""Optimizers and schedules: parameters in, groups with their settings out."""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Optional

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lm_lightning.errors import UserError
from lm_lightning.networks import blocks

SMALL = 1 << 17  # elements of a matrix; the products of larger ones are as fast one at a time on a CPU

TOGETHER = 1 << 25  # elements of the matrices that are updated at once, which bounds the memory

OptimizerFactory = Callable[[Iterable], torch.optim.Optimizer]


def parameter_groups(network: transformers.PreTrainedModel, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Groups the trainable parameters of a network by what an optimizer should do with them.

    Args:
        network: A `transformers` network.
        layer_decay: Factor of the learning rate from each layer to the one below it. Parameters above the layers have
            the full rate; those below them count as one more layer (Howard and Ruder, 2018, arXiv:1801.06146).

    Returns:
        Groups named `hidden` (the matrices of the layers, which Muon can train), `embeddings` (token and position
        embeddings and the head), `tensors` (of three and more dimensions, such as stacked experts) and `vectors`
        (biases and norms, without weight decay). Empty groups are omitted. With a layer decay, each is divided by
        layers, and has an `lr_factor`, by which its learning rate is multiplied.
    """
    decays = {"vectors": {"weight_decay": 0.0}}
    outside = {id(p) for m in network.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = network.get_output_embeddings()
    outside |= {id(p) for p in head.parameters()} if head is not None else set()
    depths = {} if layer_decay == 1 else depth_of_parameters(network)
    groups: dict[tuple[str, int], list[nn.Parameter]] = {}
    for parameter in network.parameters():
        if parameter.requires_grad:
            if parameter.ndim == 2:
                name = "embeddings" if id(parameter) in outside else "hidden"
            else:
                name = "vectors" if parameter.ndim < 2 else "tensors"
            groups.setdefault((name, depths.get(id(parameter), 0)), []).append(parameter)
    order = ("hidden", "embeddings", "tensors", "vectors")
    return [
        {"name": name, "params": parameters, **decays.get(name, {})}
        | ({} if layer_decay == 1 else {"lr_factor": layer_decay**depth})
        for (name, depth), parameters in sorted(groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1]))
    ]


def depth_of_parameters(network: transformers.PreTrainedModel) -> dict[int, int]:
    """How many layers are above each parameter, by its `id`: 0 for the head, and one more than all for embeddings."""
    layers = blocks(network)
    depths = {id(p): len(layers) - number for number, layer in enumerate(layers) for p in layer.parameters()}
    under = len(layers) + 1
    for parameter in network.base_model.parameters():  # in the order of the forward pass
        under = 0 if id(parameter) in depths else under
        depths.setdefault(id(parameter), under)
    return {id(p): 0 for p in network.parameters()} | depths


def make_optimizer(
    network: transformers.PreTrainedModel,
    factory: OptimizerFactory,
    schedule: "Schedule",
    total_steps: Callable[[int], float],
    layer_decay: float = 1.0,
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """The optimizer of a network's trainable parameters, and the scheduler of its learning rates.

    Args:
        network: A `transformers` network, perhaps sharded.
        factory: Makes the optimizer of groups of parameters.
        schedule: Schedule of the learning rate.
        total_steps: Optimizer steps of the run, as known at a step.
        layer_decay: See `parameter_groups`.

    Raises:
        UserError: If the optimizer does not accept its settings, or cannot step with sharded weights.
    """
    try:
        optimizer = factory(parameter_groups(network, layer_decay))
    except (ValueError, TypeError) as error:
        raise UserError(f"the optimizer does not accept its settings: {error}") from error
    sharded = any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
    if sharded and type(optimizer).__module__.startswith("bitsandbytes."):
        raise UserError(
            f"{type(optimizer).__name__} of bitsandbytes cannot step with sharded weights: use --trainer.strategy ddp, "
            "or an optimizer of torch"
        )
    fuse(optimizer)
    for group in optimizer.param_groups:
        group["lr"] *= group.get("lr_factor", 1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule.factor(step, total_steps(step)))
    return optimizer, scheduler


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Makes Adam and AdamW of torch use their fused kernels, which need a third of the time on a CPU.

    Groups with `fused` or `foreach` in their settings keep these, and so do groups that the kernels do not support.
    """
    for part in getattr(optimizer, "parts", [optimizer]):
        for group in part.param_groups if type(part) in (torch.optim.Adam, torch.optim.AdamW) else ():
            other = group["foreach"] is not None or group["capturable"] or group["differentiable"]
            if group["fused"] is None and not other and all(map(has_kernel, group["params"])):
                group["fused"] = True


def has_kernel(parameter: Tensor) -> bool:
    """Whether the fused kernels support a parameter."""
    known = parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point()
    return known and not isinstance(parameter, DTensor)


def restore_settings(optimizer: torch.optim.Optimizer, settings: list[dict[str, Any]]) -> None:
    """Replaces the settings of each parameter group, which a checkpoint has restored, by those of this run."""
    for group, own in zip(optimizer.param_groups, settings):
        group.update(own)
        if group.get("fused"):  # its kernels read the number of steps on the device of the parameter
            for parameter in group["params"]:
                if isinstance(step := optimizer.state.get(parameter, {}).get("step"), Tensor):
                    optimizer.state[parameter]["step"] = step.to(parameter.device, torch.float32)


def group_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The settings of each parameter group of an optimizer, without its current learning rate."""
    return [
        {key: copy.copy(value) for key, value in group.items() if key not in ("params", "lr")}
        for group in optimizer.param_groups
    ]


class BatchedMuon(torch.optim.Muon):
    """Muon of torch with `match_rms_adamw`, which updates matrices of the same shape together where that is faster.

    On a CPU, these are small matrices. The results are those of torch, except for the rounding of bfloat16. Sharded
    matrices are updated one at a time.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        done: list[tuple[nn.Parameter, Tensor]] = []
        for group in self.param_groups:
            for parameters in batches(group["params"]):
                done += [(parameter, parameter.grad) for parameter in parameters]  # type: ignore[misc]
                self.update(parameters, group)
        for parameter, _ in done:  # the others are those that have a gradient now
            parameter.grad = None
        super().step()
        for parameter, gradient in done:
            parameter.grad = gradient

    def update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Updates matrices of the same shape."""
        gradients: Any = [parameter.grad for parameter in parameters]
        for parameter, gradient in zip(parameters, gradients):
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(gradient)
        momenta = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        for momentum, gradient in zip(momenta, gradients):
            momentum.lerp_(gradient, 1 - group["momentum"])
        updates = torch.stack(momenta)
        if group["nesterov"]:
            updates = torch.stack(gradients).lerp(updates, group["momentum"])
        updates = orthogonalize(updates, group["ns_coefficients"], group["ns_steps"], group["eps"])
        rate = float(group["lr"])
        step_size = rate * 0.2 * math.sqrt(max(parameters[0].shape))  # `match_rms_adamw`
        for parameter, update in zip(parameters, updates):
            parameter.mul_(1 - rate * group["weight_decay"]).add_(update, alpha=-step_size)


def batches(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Groups matrices that have a gradient by shape, if updating them together is faster than one at a time."""
    found: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        small = parameter.device.type != "cpu" or parameter.numel() <= SMALL
        if parameter.grad is not None and small and not isinstance(parameter, DTensor):
            key = (parameter.shape, parameter.dtype, parameter.grad.dtype, parameter.device)
            found.setdefault(key, []).append(parameter)
    parts = []
    for group in found.values():
        size = max(1, TOGETHER // group[0].numel())
        parts += [group[i : i + size] for i in range(0, len(group), size)]
    return [part for part in parts if len(part) > 1]


def orthogonalize(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The Newton-Schulz iteration of torch's Muon, for matrices (N, R, C); computed in bfloat16."""
    a, b, c = coefficients
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices.bfloat16() if wide else matrices.bfloat16().mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the hidden matrices and AdamW for everything else, as one optimizer.

    Muon makes each update of a matrix orthogonal (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon);
    its step size is scaled to the root mean square of AdamW's (Liu et al., 2025, arXiv:2502.16982), so that one
    learning rate serves both.

    Args:
        params: Parameter groups; the one with the name `hidden` goes to Muon.
        lr: Learning rate of both.
        weight_decay: Decoupled weight decay of matrices.
        momentum: Momentum of Muon.
        betas: Decay rates of AdamW's running averages.
        eps: Term that AdamW adds to the denominator.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        groups = list(params)
        if not all(isinstance(group, dict) and "name" in group for group in groups):
            raise UserError("MuonAdamW needs groups that name the hidden matrices: use parameter_groups(network)")
        hidden = [group for group in groups if group["name"] == "hidden"]
        others = [group for group in groups if group["name"] != "hidden"]
        self.parts: list[torch.optim.Optimizer] = []
        if hidden:
            self.parts.append(
                BatchedMuon(hidden, lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw")
            )
        if others:
            self.parts.append(torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps))
        # The parts share this object's groups and state, so that schedulers and checkpoints see one optimizer.
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        start = 0
        for part in self.parts:
            stop = start + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[start:stop], self.state
            start = stop

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()  # loading made new groups and a new state

    @torch.no_grad()
    def step(self, closure: Optional[Callable[[], Any]] = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


@dataclass
class Schedule:
    """Learning rate over the optimizer steps, as a factor of the optimizer's own.

    If only `trainer.max_time` ends the run, shares of the run are shares of this time.

    Args:
        shape: After the warm-up, `cosine` and `linear` decrease to `min_lr_ratio` over all remaining steps; `constant`
            does not change; `wsd` (warmup, stable, decay) decreases linearly over the last `decay_ratio` of the steps.
        warmup_ratio: Share of all steps in which the rate rises linearly from nearly 0, if `warmup_steps` is not given.
        warmup_steps: Optimizer steps of the warm-up, instead of a share of the run.
        min_lr_ratio: Learning rate at the last step, as a fraction of the optimizer's.
        decay_ratio: Share of all steps in which `wsd` decreases.
    """

    shape: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_ratio: float = 0.05
    warmup_steps: Optional[int] = None
    min_lr_ratio: float = 0.1
    decay_ratio: float = 0.2

    def factor(self, step: int, total_steps: float) -> float:
        """The factor of optimizer step `step`, counted from 0, of a run of `total_steps`."""
        warmup = self.warmup(total_steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.shape == "constant":
            return 1.0
        begin: float = warmup
        if self.shape == "wsd":
            begin = max(begin, total_steps - 1 - max(1, round(self.decay_ratio * total_steps)))
        progress = min(1.0, max(0, step - begin) / max(1, total_steps - 1 - begin))
        fall = (1 + math.cos(math.pi * progress)) / 2 if self.shape == "cosine" else 1 - progress
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * fall

    def warmup(self, total_steps: float) -> int:
        """Optimizer steps of the warm-up of a run of `total_steps`."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return 0 if math.isinf(total_steps) else int(self.warmup_ratio * total_steps)

    def check(self, total_steps: float) -> None:
        """Refuses a schedule that a run of `total_steps` optimizer steps cannot follow."""
        for name, most in (("warmup_ratio", 1), ("warmup_steps", math.inf), ("min_lr_ratio", 1), ("decay_ratio", 1)):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= most:
                between = "0 or more" if most == math.inf else "between 0 and 1"
                raise UserError(f"model.schedule.{name} is {value}, but must be {between}")
        if self.shape != "constant" and math.isinf(total_steps):
            raise UserError(
                f"the {self.shape} schedule depends on the length of the run: set trainer.max_steps, "
                "trainer.max_epochs or trainer.max_time, or use model.schedule.shape constant"
            )
        if self.warmup_steps is None and self.warmup_ratio and math.isinf(total_steps):
            raise UserError(
                "model.schedule.warmup_ratio is a share of the run, which has no end: set trainer.max_steps, "
                "trainer.max_epochs or trainer.max_time, or model.schedule.warmup_steps"
            )
        if self.warmup(total_steps) >= total_steps:
            raise UserError(
                f"the warm-up of {self.warmup(total_steps)} steps is as long as the run of {total_steps:.0f} steps or "
                "longer: lower model.schedule.warmup_steps, or omit it to use model.schedule.warmup_ratio"
            )
