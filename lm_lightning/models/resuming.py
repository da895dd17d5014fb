"""Resuming: refuses checkpoints whose network, tokenizer or optimizer state do not fit this run."""

import hashlib
from collections.abc import Sequence
from typing import Any, Optional

import torch
import transformers

from lm_lightning.data.tokenizer import fingerprint
from lm_lightning.errors import UserError
from lm_lightning.models import adapter as adapters
from lm_lightning.optim import parameter_groups

# Network settings with these parts in their names may change on resuming: they affect neither weights nor evaluations.
HARMLESS_KEYS = ("drop", "use_cache", "transformers_version", "dtype", "_name_or_path", "token_id", "architectures")
NEW_RUN = "or start a new run from the weights with --model.pretrained RUN/model"


def state_of(module: Any) -> dict[str, Any]:
    """The entries of a `LanguageModule` in a checkpoint, in addition to Lightning's own."""
    state = {
        "network": module.description(),
        "tokenizer": None if module.tokenizer is None else fingerprint(module.tokenizer),
        "optimizer": type(module.optimizers().optimizer).__name__,
        "parameters": grouping(module.network, module.layer_decay, module.freeze_patterns),
        "skipped_steps": module.optimizer_steps.nonfinite.skipped,
    }
    return state if module.adapter is None else state | {"adapter": module.adapter_record}


def check(module: Any, checkpoint: dict[str, Any]) -> None:
    """Refuses a checkpoint that a `LanguageModule` cannot load or, in training, cannot resume from.

    Raises:
        UserError: Names the difference.
    """
    refuse_other_network(checkpoint["network"]["config"], module.description()["config"])
    tokenizer = None if module.tokenizer is None else fingerprint(module.tokenizer)
    refuse_other_tokenizer(checkpoint.get("tokenizer", tokenizer), tokenizer)
    if module.adapter is None:
        adapters.refuse_other(checkpoint.get("adapter"), None)
    else:
        ignored = module.adapter.training_options
        adapters.refuse_other(checkpoint.get("adapter"), module.adapter_record, ignored)
    if module.trainer.state.fn != "fit":
        return
    optimizer = module.optimizer_factory(parameter_groups(module.network, module.layer_decay))
    refuse_other_optimizer(checkpoint["optimizer"], optimizer)
    own = grouping(module.network, module.layer_decay, module.freeze_patterns)
    refuse_other_grouping(checkpoint.get("parameters", own), own)


def refuse_other_network(saved: dict[str, Any], own: dict[str, Any]) -> None:
    """Refuses a checkpoint of another network.

    Args:
        saved: The config of the checkpoint's network.
        own: The config of this run's network.

    Raises:
        UserError: Names the settings that differ.
    """
    different = [
        f"{key} {saved.get(key)} (here {own.get(key)})"
        for key in sorted(saved.keys() | own.keys())
        if saved.get(key) != own.get(key) and not any(part in key for part in HARMLESS_KEYS)
    ]
    if different:
        raise UserError(
            f"the checkpoint's network has {', '.join(different)}: use the model.network with which it was made"
        )


def refuse_other_tokenizer(saved: Optional[str], own: Optional[str]) -> None:
    """Refuses a checkpoint that was trained with another tokenizer.

    Args:
        saved: Fingerprint of the checkpoint's tokenizer; None if its data had none.
        own: The same of this run.

    Raises:
        UserError: Names the tokenizer to use.
    """
    if saved != own:
        raise UserError(
            "the checkpoint was made with another tokenizer than the data's, so its tokens have other meanings: give "
            "the tokenizer/ of its run folder as data.tokenizer.path"
        )


def grouping(network: transformers.PreTrainedModel, layer_decay: float, frozen: Sequence[str]) -> dict[str, Any]:
    """How the parameters are grouped in the optimizer's state, JSON-serializable.

    Args:
        network: The network.
        layer_decay: See `parameter_groups`.
        frozen: Patterns of names of frozen parameters.

    Returns:
        The options that determine it, by their names, and `groups`, a hash of the names in each group.
    """
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in parameter_groups(network, layer_decay)]
    return {
        "model.layer_decay": layer_decay,
        "model.freeze": list(frozen),
        "groups": hashlib.sha256(repr(groups).encode()).hexdigest()[:16],
    }


def refuse_other_grouping(saved: dict[str, Any], own: dict[str, Any]) -> None:
    """Refuses a checkpoint whose optimizer state belongs to other groups of parameters, see `grouping`.

    Raises:
        UserError: Names the options that differ.
    """
    if saved["groups"] == own["groups"]:
        return
    changed = [
        f"{name} {saved[name]} (here {value})"
        for name, value in own.items()
        if name != "groups" and saved[name] != value
    ]
    raise UserError(
        f"the checkpoint was made with {', '.join(changed) or 'other trained parameters'}, and its optimizer state "
        f"fits only these: use the old value, {NEW_RUN}"
    )


def refuse_other_optimizer(saved: str, own: torch.optim.Optimizer) -> None:
    """Refuses a checkpoint of another class of optimizer.

    Args:
        saved: The name of its class.
        own: The optimizer of this run, or one like it.

    Raises:
        UserError: Names both.
    """
    if saved != type(own).__name__:
        raise UserError(
            f"the checkpoint's optimizer is {saved}, this run's {type(own).__name__}, which cannot use its state: use "
            f"the same, {NEW_RUN}"
        )
