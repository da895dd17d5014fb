"""Optimizer steps: turns the losses of micro-batches into gradients of the mean over all target tokens of a step.

The mean is exact however a step is split into micro-batches and processes, and however many targets each of them has.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, Optional

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lm_lightning.compat.torch import multiply, skip_step_if
from lm_lightning.data import contract
from lm_lightning.data.order import PADDING
from lm_lightning.models.nonfinite import Copied, NonFiniteGuard, Step
from lm_lightning.networks import gradient_norm
from lm_lightning.strategies.capabilities import capabilities


class StepAccumulator(NamedTuple):
    """Sums over the micro-batches of the optimizer step in progress, of this process.

    Attributes:
        step: Optimizer steps before it.
        rows: Samples in it.
        samples: Their ids; empty if the data has none.
        loss_sum: Loss, summed over target tokens: () float32.
        tokens: Target tokens: () int64, or float32 if they are weighted.
    """

    step: int
    rows: int
    samples: list[int]
    loss_sum: Tensor
    tokens: Tensor


class OptimizerSteps:
    """Scales gradients, checks that they are finite, and counts samples.

    Args:
        on_nonfinite: See `NonFiniteGuard`.
        skip_limit: See `NonFiniteGuard`.
        gather: See `NonFiniteGuard`.
        print: See `NonFiniteGuard`.

    Attributes:
        current: The step in progress; None between two steps.
        gradient_norm: Global norm of the latest step's gradient, before clipping, () float32.
        nonfinite: Watches the losses.
    """

    def __init__(
        self,
        on_nonfinite: Literal["stop", "skip"],
        skip_limit: int,
        gather: Callable[[list[int]], list[int]],
        print: Callable[[str], Any],
    ) -> None:
        self.nonfinite = NonFiniteGuard(on_nonfinite, skip_limit, gather, print)
        self.current: Optional[StepAccumulator] = None
        self.gradient_norm: Tensor

    @property
    def rows(self) -> int:
        """Samples of the step in progress so far."""
        return self.current.rows if self.current else 0

    def add(self, trainer: Trainer, batch: dict, loss_sum: Tensor, tokens: Tensor) -> Tensor:
        """Adds a micro-batch.

        Args:
            trainer: The trainer.
            batch: The micro-batch.
            loss_sum: Its loss, summed over target tokens: () float32.
            tokens: Number of its target tokens, ().

        Returns:
            The loss to call `backward` of, () float32.
        """
        sums = self.current or StepAccumulator(
            trainer.global_step, 0, [], torch.zeros_like(loss_sum), torch.zeros_like(tokens)
        )
        self.current = StepAccumulator(
            sums.step,
            sums.rows + contract.rows(batch),
            sums.samples + contract.sample_ids(batch),
            sums.loss_sum + loss_sum.detach(),
            sums.tokens + tokens,
        )
        # The divisor is known when the step is complete; until then, a constant keeps the sums near 1.
        return loss_sum / contract.optional(trainer.datamodule, "tokens_per_batch")

    def finish(
        self, trainer: Trainer, module: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
    ) -> dict[str, Tensor]:
        """Makes the accumulated gradient that of the mean over the step's target tokens; all processes call it.

        Returns:
            Metrics to log.
        """
        sums, self.current, data = self.current, None, trainer.datamodule
        assert sums is not None, "an optimizer step comes after at least one training step"
        totals = trainer.strategy.reduce(torch.stack([sums.loss_sum, sums.tokens.float()]), reduce_op="sum")
        loss_sum, tokens = totals[0], totals[1].where(totals[1] > 0, 1)  # (weighted targets may sum to less than 1)
        # Lightning has divided by the micro-batches, the strategy by the replicas, `add` by its constant; a replica of
        # several processes (tensor parallelism) has counted its tokens on each.
        constant = contract.optional(data, "tokens_per_batch")
        parameters = list(module.parameters())  # once, as finding them takes time
        scale_gradients(parameters, trainer.accumulate_grad_batches * trainer.world_size * constant / tokens)
        self.gradient_norm = gradient_norm(parameters)
        skipping = self.check_finite(trainer, module, optimizer, device, sums, (loss_sum, tokens))
        if hasattr(data, "advance"):
            data.advance(sums.rows)
        elif contract.optional(data, "consumed") is not None:
            data.consumed += sums.rows * contract.place(trainer)["num_replicas"]
        metrics = {
            # Lightning's name for the x-axis of the loggers: finished steps
            "step": torch.tensor(float(sums.step + 1)),  # (numbers, not tensors, it would send to the device)
            "train/loss": loss_sum / tokens,
            "train/gradient_norm": self.gradient_norm,
            "train/learning_rate": torch.tensor(optimizer.param_groups[0]["lr"]),
        }
        if skipping:
            metrics["train/skipped_steps"] = torch.tensor(float(self.nonfinite.skipped))
        return metrics

    def clip_norm(self, parameters: Iterable[nn.Parameter], limit: float) -> None:
        """Scales the latest step's gradients so that their global norm is at most `limit`."""
        if self.gradient_norm.device.type == "cpu" and self.gradient_norm + 1e-6 <= limit:
            return  # reading the norm of another device would wait for it
        scale_gradients(parameters, (limit / (self.gradient_norm + 1e-6)).clamp(max=1))

    def check_finite(
        self,
        trainer: Trainer,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        sums: StepAccumulator,
        totals: tuple[Tensor, Tensor],
    ) -> bool:
        """Stops the run at a loss or gradient that is not finite, or skips the step; returns whether steps are skipped.

        Reading a value makes the host wait for the device. Therefore a GPU's value is copied to the host, and the copy
        is read one step later; that of a lazy device (XLA) is read after a step that was logged, which waits anyway.
        With float16, the scaler itself causes infinite gradients and skips their steps.
        """
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        skip = self.nonfinite.on_nonfinite == "skip" and not scaled
        in_kernel = skip and all(group.get("fused") for group in optimizer.param_groups)
        loss_sum, tokens = totals
        loss = (loss_sum + 0 * self.gradient_norm) / tokens
        if in_kernel:
            skip_step_if(optimizer, ~torch.isfinite(loss))
        if not scaled:
            self.nonfinite.pending.append(
                Step(sums.step + 1, sums.samples, Copied(loss) if device.type == "cuda" else loss)
            )
        at_once = device.type == "cpu" or (skip and not in_kernel)
        if at_once or not capabilities(trainer.strategy).lazy or sums.step % trainer.log_every_n_steps == 0:
            finite = self.nonfinite.check(keep=0 if at_once else 1)
            if at_once and not finite and not in_kernel:
                for parameter in module.parameters():
                    parameter.grad = None  # an optimizer does not change such parameters and their state
        return skip


def gather_samples(module: LightningModule, own: list[int]) -> list[int]:
    """The ids of samples of all processes, which must call this together; empty if the data has none."""
    if not own:
        return []
    samples = module.all_gather(torch.tensor(own, device=module.device)).flatten().tolist()
    return sorted({sample for sample in samples if sample != PADDING})


def schedule_steps(trainer: Trainer, total_steps: float) -> Callable[[int], float]:
    """The number of optimizer steps over which the learning rate's schedule extends, as known at a step.

    If only `trainer.max_time` ends the run, it is the number for which the share of the steps that are done equals the
    share of the time that has passed. The processes use the time of the first one, as their rates must be equal.

    Args:
        trainer: The trainer.
        total_steps: Optimizer steps of the run, `inf` if their number is not known.
    """
    timers = [c for c in trainer.callbacks if isinstance(c, Timer) and c.time_remaining() is not None]
    if not timers or not math.isinf(total_steps):
        return lambda step: total_steps

    @functools.lru_cache(1)  # for all groups of parameters
    def estimate(step: int) -> float:
        if step == 0:
            return 1e9
        passed, left = timers[0].time_elapsed(), timers[0].time_remaining()
        share = trainer.strategy.broadcast(passed / max(passed + left, 1e-9))  # type: ignore[operator]
        return max(step + 1, step / max(share, 1e-9))

    return estimate


def set_seed(seed: int, device: torch.device) -> None:
    """Sets the seed of the random numbers of a device, as `torch.manual_seed` does for all kinds of devices."""
    if device.type == "cpu":  # the other devices, which are not used, would need longer
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """Multiplies all gradients by a number, () float."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        multiply([g.to_local() if isinstance(g, DTensor) else g for g in gradients], factor)
