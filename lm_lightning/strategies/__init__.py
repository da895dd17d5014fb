"""The strategies that `--trainer.strategy` names, with the settings that language models need.

A strategy decides where weights, data and computation are. The models do not depend on it, and a run has the same
losses with each. Lightning's own `auto`, `ddp` and `ddp_spawn` are used as they are.
"""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.strategies import Strategy, StrategyRegistry

from lm_lightning.errors import UserError
from lm_lightning.strategies.capabilities import capabilities

REFUSED = {
    "fsdp": "PyTorch's first FSDP is superseded by its second",
    "deepspeed": "DeepSpeed does not expose its gradients, so a step could not be exact over unequal batches",
}
names = ["auto", "ddp", "ddp_spawn"]  # known to work
replacements: dict[str, str] = {}  # for the names in REFUSED


def register(
    name: str, strategy: type[Strategy], description: str, replaces: Sequence[str] = (), **settings: Any
) -> None:
    """Makes a strategy available as `--trainer.strategy NAME`.

    Args:
        name: Name of the strategy with these settings.
        strategy: Its class, which states its capabilities.
        description: What it does, in a few words.
        replaces: Names in `REFUSED` for which messages recommend this strategy.
        settings: Arguments of the class.
    """
    StrategyRegistry.register(name, strategy, description=description, override=True, **settings)
    if name not in names:
        names.append(name)
    replacements.update(dict.fromkeys(replaces, name))


def check_name(name: object) -> None:
    """Refuses names of strategies that do not exist, or whose results would be wrong.

    Raises:
        UserError: Names what to use instead.
    """
    if not isinstance(name, str):
        return
    family = name.split("_")[0]  # as in deepspeed_stage_2
    if family in REFUSED:
        raise UserError(f"{REFUSED[family]}: use --trainer.strategy {replacements.get(family, 'ddp')}")
    if "." in name:  # without options of the class, jsonargparse leaves it a string, which Lightning does not know
        raise UserError(
            f"--trainer.strategy {name} is an import path, not a name: give a class as '{{class_path: {name}}}'"
        )
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
