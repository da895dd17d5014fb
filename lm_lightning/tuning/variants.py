"""The variants in which `verify` runs a config, and their requirements."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple, Optional


class Differences(NamedTuple):
    """The differences between a run and its base.

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
    """A way to run a config, and how close its metrics must be to those of another variant, its base.

    Args:
        flags: Flags of `fit`, in addition to those that follow from the numbers below.
        processes: Number of processes per node, each with its own GPU or all on the CPU.
        nodes: Number of nodes; all are simulated on this machine.
        shares: Number of parts into which the processes divide a batch; 1 if all of them work on the same samples.
        micro_batches: Number of gradient accumulation steps.
        base: The variant with which it is compared; None for a base.
        tolerance: Largest accepted differences. The first step has only the differences of gradients; later, the
            optimizer amplifies rounding errors (Muon, which computes in bf16, a hundred times as much as AdamW).
        option: An option of the data that it needs.
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
VARIANTS = {  # a base comes before the variants that are compared with it
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
        reason: The reason why there are no metrics; empty if there are.
        failed: Whether the variant failed, as opposed to being skipped.
        losses: Loss of each step, in nats per token.
        gradient_norms: Gradient norm of each step.
        tokens_per_second: Tokens per second of the median step after the first.
        memory: Peak memory of the first process in GiB; None if unknown.
        environment: `environment.json`, and the `device`.
    """

    reason: str = ""
    failed: bool = False
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    tokens_per_second: float = 0.0
    memory: Optional[float] = None
    environment: dict = field(default_factory=dict)


def skip_reason(variant: Variant, data: dict, outcomes: dict[str, Outcome]) -> str:
    """The reason why a variant cannot be run on this machine; empty if it can be.

    Args:
        variant: The variant.
        data: The data section of the settings.
        outcomes: Outcomes of the previous variants; the first one describes the machine.
    """
    options = data["init_args"]
    parts = variant.shares * variant.micro_batches
    for option in (variant.option, "batch_size" if parts > 1 else None):
        if option is not None and option not in options:
            return f"{data['class_path'].rpartition('.')[2]} has no {option}"
    if parts > 1 and options["batch_size"] % parts:
        return f"data.batch_size {options['batch_size']} is not divisible by {parts}"
    if variant.base is None:
        return ""
    if outcomes[variant.base].reason:
        return f"{variant.base} has no metrics"
    environment = outcomes[variant.base].environment
    kind = environment["device"].partition(":")[0]
    there = math.inf if kind == "cpu" else max(1, len(environment["gpus"]))
    if variant.nodes > 1 and kind != "cpu":
        return f"needs {variant.nodes} nodes, which only processes on a CPU can simulate (--trainer.accelerator cpu)"
    if variant.processes > there:
        return f"needs {variant.processes} GPUs, but this machine has {there} (or use --trainer.accelerator cpu)"
    return ""
