"""The ways in which `verify` runs a config, and what they need of a machine."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple, Optional


class Differences(NamedTuple):
    """How far a run is from its base.

    Args:
        first_gradient_norm: Relative difference of the gradient norm at the first step.
        gradient_norm: The largest relative difference of any step.
        loss: The largest difference of the loss of any step, in nats per token.
    """

    first_gradient_norm: float
    gradient_norm: float
    loss: float


@dataclass(frozen=True)
class Variant:
    """A way to run a config, and how close its numbers must be to those of another way, its base.

    Args:
        flags: Of `fit`, beside those that follow from the numbers below.
        processes: How many run on a node, on a GPU each or all on the CPU.
        nodes: How many nodes, all of which are simulated on this machine.
        shares: Number of parts into which the processes divide a batch; 1 if all of them work on the same samples.
        micro_batches: Gradient accumulation steps.
        base: The variant that it is compared with; None for a base.
        tolerance: Largest accepted differences. That of the first step is of the gradient alone; later, the optimizer
            amplifies rounding (Muon, which computes in bf16, a hundred times as much as AdamW).
        option: The option of the data that it needs.
    """

    flags: tuple[str, ...] = ()
    processes: int = 1
    nodes: int = 1
    shares: int = 1
    micro_batches: int = 1
    base: Optional[str] = "plain"
    tolerance: Differences = Differences(first_gradient_norm=1e-4, gradient_norm=1e-2, loss=1e-3)
    option: Optional[str] = None


DOCUMENTS = "--data.mask_documents=true"
VARIANTS = {  # a base comes before what is compared with it
    "plain": Variant(base=None),
    "accumulate": Variant(micro_batches=2),
    "compile": Variant(("--model.compile=true",)),
    "checkpointing": Variant(("--model.activation_checkpointing=1",)),
    "bf16": Variant(("--trainer.precision=bf16-mixed",), tolerance=Differences(0.02, 0.1, 0.05)),
    "documents_eager": Variant((DOCUMENTS, "--model.attn_implementation=eager"), base=None, option="mask_documents"),
    "documents": Variant(
        (DOCUMENTS, "--model.attn_implementation=sdpa"), base="documents_eager", option="mask_documents"
    ),
    "ddp": Variant(("--trainer.strategy=ddp",), processes=2, shares=2),
    "ddp_accumulate": Variant(("--trainer.strategy=ddp",), processes=2, shares=2, micro_batches=2),
    "ddp_spawn": Variant(("--trainer.strategy=ddp_spawn",), processes=2, shares=2),
    # fork: sharding
    "fsdp2": Variant(("--trainer.strategy=fsdp2",), processes=2, shares=2),
    "hsdp": Variant(("--trainer.strategy=hsdp",), processes=2, nodes=2, shares=4),
    "tp": Variant(("--trainer.strategy=tp",), processes=2),
    "tp_fsdp2": Variant(
        ("--trainer.strategy=lm_lightning.sharding.strategy.TensorParallel", "--trainer.strategy.size=2"),
        processes=4,
        shares=2,
    ),
    # fork: end
}


@dataclass
class Outcome:
    """The result of a variant.

    Args:
        reason: Why there are no numbers.
        failed: Whether there should be some.
        losses: Of each step, in nats per token.
        gradient_norms: Of each step.
        tokens_per_second: Of the median step after the first.
        memory: Peak of the first process in GiB; None if unknown.
        environment: `environment.json`, and the `device`.
    """

    reason: str = ""
    failed: bool = False
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    tokens_per_second: float = 0.0
    memory: Optional[float] = None
    environment: dict = field(default_factory=dict)


def obstacle(variant: Variant, data: dict, outcomes: dict[str, Outcome]) -> str:
    """Why a variant cannot be run here, empty if it can.

    Args:
        variant: Which one.
        data: Section of the settings.
        outcomes: Of the variants before it, the first of which has recorded the machine.
    """
    options = data["init_args"]
    if variant.option is not None and variant.option not in options:
        return f"{data['class_path'].rpartition('.')[2]} has no {variant.option}"
    parts = variant.shares * variant.micro_batches
    if options["batch_size"] % parts:
        return f"data.batch_size {options['batch_size']} is not divisible by {parts}"
    if variant.base is None:
        return ""
    if outcomes[variant.base].reason:
        return f"{variant.base} has no numbers"
    environment = outcomes[variant.base].environment
    kind = environment["device"].partition(":")[0]
    there = math.inf if kind == "cpu" else max(1, len(environment["gpus"]))
    if variant.nodes > 1 and kind != "cpu":
        return f"needs {variant.nodes} nodes, which only processes on a CPU can simulate (--trainer.accelerator cpu)"
    if variant.processes > there:
        return f"needs {variant.processes} GPUs, this machine has {there} (or --trainer.accelerator cpu)"
    return ""
