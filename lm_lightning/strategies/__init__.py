"""Strategies: what `--trainer.strategy` names, each with what language models need already right.

A strategy says where the weights, the data and the work lie. The models know nothing of it, and a run has the same
losses under each. Lightning's own `auto`, `ddp` and `ddp_spawn` are used as they are.
"""

from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy, StrategyRegistry

from lm_lightning.checkpoints.plugins import BackgroundCheckpoints
from lm_lightning.errors import UserError
from lm_lightning.strategies.sharded import FSDP2, TensorParallel
from lm_lightning.xla.strategy import XLA, XLADevices, XLASharded

# name -> strategy, its settings and what it does
PRESETS = {
    "fsdp2": (FSDP2, {}, "weights, gradients and optimizer sharded over all processes"),
    "hsdp": (FSDP2, {"within_node": True}, "sharded over the processes of a node, repeated on each node"),
    "tp": (TensorParallel, {}, "each matrix split over the processes of a node, which share their batches"),
    "xla": (XLA, {}, "one device, through torch_xla"),
    "xla_spmd": (XLASharded, {}, "all devices, driven by one process, through torch_xla"),
}
SUPPORTED = (SingleDeviceStrategy, DDPStrategy, FSDP2)
REPLACED = {
    "fsdp": "PyTorch's first FSDP is superseded by its second: take --trainer.strategy fsdp2",
    "deepspeed": (
        "DeepSpeed keeps the gradients to itself, so that a step could not be made exact over unequal batches: take "
        "--trainer.strategy fsdp2, which shards as much as DeepSpeed's stage 3"
    ),
}
for name, (strategy, settings, description) in PRESETS.items():
    StrategyRegistry.register(name, strategy, description=description, override=True, **settings)
AcceleratorRegistry.register("xla", XLADevices, "TPUs, or the CPU, through torch_xla", override=True)


def check_name(name: object) -> None:
    """Refuses what `--trainer.strategy` names and Lightning would fail at, or take although its results were wrong.

    Raises:
        UserError: Says what to take instead.
    """
    if not isinstance(name, str):
        return
    sentence = REPLACED.get(name.split("_")[0])  # as in deepspeed_stage_2
    if sentence is not None:
        raise UserError(sentence)
    if name != "auto" and name not in StrategyRegistry.available_strategies() and "." not in name:
        known = ", ".join(["auto", "ddp", "ddp_spawn", *PRESETS])
        raise UserError(f"there is no strategy {name} (--trainer.strategy): take one of {known}")


def check(strategy: Strategy) -> None:
    """Refuses strategies of which it is not known that they leave gradients as `LanguageModule` expects them.

    Raises:
        UserError: Names the strategy, or says why it cannot work with these processes.
    """
    if isinstance(strategy, FSDP2):
        strategy.check_processes()
        if strategy.sharded_checkpoints and isinstance(strategy.checkpoint_io, BackgroundCheckpoints):
            raise UserError(
                "BackgroundCheckpoints (--trainer.plugins) writes files from one process, and a folder of "
                "sharded_checkpoints is written by all of them at once: leave one of the two out"
            )
    if not isinstance(strategy, SUPPORTED):
        raise UserError(
            f"{type(strategy).__name__} is not supported (--trainer.strategy): take auto, ddp, {', '.join(PRESETS)}"
        )
