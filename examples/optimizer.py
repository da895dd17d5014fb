"""An optimizer: Lion (Chen et al., 2023, arXiv:2302.06675), whose updates are signs."""

from collections.abc import Callable, Iterable
from typing import Any, Optional

import torch


class Lion(torch.optim.Optimizer):
    """Evolved sign momentum.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate, about a third to a tenth of AdamW's.
        betas: Decay rates of the update and of the momentum.
        weight_decay: Decoupled weight decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Optional[Callable[[], Any]] = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:  # Lightning computes the loss and the gradients in it
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update_beta, momentum_beta = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                update = torch.lerp(parameter.grad, momentum, update_beta).sign()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
                momentum.lerp_(parameter.grad, 1 - momentum_beta)
        return loss
