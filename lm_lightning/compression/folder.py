"""Folders of models: what a step of a recipe reads and leaves."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor

from lm_lightning import errors, hub
from lm_lightning.errors import UserError
from lm_lightning.models.export import HEAD_FILE
from lm_lightning.security import untrusted

PROGRAMS = (".onnx", ".pt2")  # not for `transformers`


def load(folder: Path, **settings: Any) -> transformers.PreTrainedModel:
    """The network of a folder, of the class that it was saved from, in evaluation mode."""
    config = hub.config(str(folder))
    named = config.architectures
    network_class = untrusted.network_class(named[0] if isinstance(named, list) and named else None)
    return hub.load(network_class, str(folder), **settings).eval()


def copy_beside(source: Path, target: Path) -> None:
    """Copies what a folder has beside the network's weights: tokenizer, a head of ours, poolings."""
    for file in source.iterdir():
        weights = file.suffix in (".safetensors", *PROGRAMS) or file.name.endswith(".index.json")
        if file.is_file() and (file.name == HEAD_FILE or not weights):
            shutil.copy(file, target)
    modules = source / "modules.json"  # of sentence-transformers
    for module in json.loads(modules.read_text(encoding="utf-8")) if modules.is_file() else []:
        name = module["path"]  # (of the network itself, none)
        if name and (folder := untrusted.inside(source, name, str(modules))).is_dir():
            shutil.copytree(folder, target / name, symlinks=True)


def save_as(
    network: transformers.PreTrainedModel, changes: dict[str, Any], weights: dict[str, Tensor], target: Path
) -> None:
    """Writes a network of other sizes.

    Args:
        network: Of the sizes until now.
        changes: Settings of its config that are others.
        weights: Of the new sizes.
        target: Folder that is there.

    Raises:
        UserError: If its class does not take them.
    """
    try:
        config = type(network.config).from_dict(network.config.to_dict() | changes)
        smaller = type(network)(config)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{type(network).__name__} does not take {changes} ({' '.join(str(error).split())[:200]}): take "
            "another share"
        ) from error
    smaller.load_state_dict(weights)
    if network.can_generate():
        smaller.generation_config = network.generation_config
    smaller.save_pretrained(target)


package = partial(errors.package, what="this recipe", extra="compress")
