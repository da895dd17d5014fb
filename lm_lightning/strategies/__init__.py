"""The strategies that `--trainer.strategy` names, with the settings that language models need.

A strategy decides where weights, data and computation are. The models do not depend on it, and a run has the same
losses with each. Lightning's own `auto`, `ddp` and `ddp_spawn` are used as they are.
"""

from typing import Any

from lightning.pytorch.strategies import Strategy, StrategyRegistry

from lm_lightning.errors import UserError
from lm_lightning.strategies.capabilities import capabilities
from lm_lightning.strategies.sharded import FSDP2, TensorParallel

REPLACED = {
    "fsdp": "PyTorch's first FSDP is superseded by its second: use --trainer.strategy fsdp2",
    "deepspeed": (
        "DeepSpeed does not expose its gradients, so a step could not be exact over unequal batches: use "
        "--trainer.strategy fsdp2, which shards as much as DeepSpeed's stage 3"
    ),
}
names = ["auto", "ddp", "ddp_spawn"]  # that are known to work


def register(name: str, strategy: type[Strategy], description: str, **settings: Any) -> None:
    """Makes a strategy available as `--trainer.strategy NAME`.

    Args:
        name: Of the strategy with these settings.
        strategy: Its class, which states its capabilities.
        description: What it does, in a few words.
        settings: Arguments of the class.
    """
    StrategyRegistry.register(name, strategy, description=description, override=True, **settings)
    if name not in names:
        names.append(name)


def check_name(name: object) -> None:
    """Refuses names of strategies that do not exist, or whose results would be wrong.

    Raises:
        UserError: Names what to use instead.
    """
    if not isinstance(name, str):
        return
    sentence = REPLACED.get(name.split("_")[0])  # as in deepspeed_stage_2
    if sentence is not None:
        raise UserError(sentence)
    if "." in name:  # without options of the class, jsonargparse leaves it a string, which Lightning does not know
        raise UserError(f"--trainer.strategy {name} is no name: give a class as '{{class_path: {name}}}'")
    if name != "auto" and name not in StrategyRegistry.available_strategies():
        raise UserError(f"there is no strategy {name} (--trainer.strategy): use one of {', '.join(names)}")


def check(strategy: Strategy) -> None:
    """Refuses strategies that do not leave gradients as `LanguageModule` expects them.

    Raises:
        UserError: Names the strategy, or states why it cannot work with these processes.
    """
    if hasattr(strategy, "check_processes"):
        strategy.check_processes()
    if not capabilities(strategy).averages_gradients:
        raise UserError(
            f"{type(strategy).__name__} is not supported (--trainer.strategy): use one of {', '.join(names)}, or a "
            "class that states averages_gradients (see lm_lightning/strategies/capabilities.py)"
        )


register("fsdp2", FSDP2, "weights, gradients and optimizer state sharded over all processes")
register("hsdp", FSDP2, "sharded over the processes of a node, replicated across nodes", within_node=True)
register("tp", TensorParallel, "each matrix split over the processes of a node, which share their batches")
