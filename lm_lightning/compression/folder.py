"""Reads and writes the model folders of the steps of a recipe."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor

from lm_lightning import errors, hub
from lm_lightning.errors import UserError, one_line
from lm_lightning.models.export import HEAD_FILE
from lm_lightning.security import untrusted

PROGRAMS = (".onnx", ".pt2")  # suffixes of files that `transformers` cannot load


def load(folder: Path, **settings: Any) -> transformers.PreTrainedModel:
    """Loads the network of a folder as an instance of the class that saved it, in evaluation mode."""
    config = hub.config(str(folder))
    named = config.architectures
    network_class = untrusted.network_class(named[0] if isinstance(named, list) and named else None)
    return hub.load(network_class, str(folder), **settings).eval()


def copy_other_files(source: Path, target: Path) -> None:
    """Copies everything except the weights of the network: the tokenizer, a separate head, settings of the pooling."""
    for file in source.iterdir():
        weights = file.suffix in (".safetensors", *PROGRAMS) or file.name.endswith(".index.json")
        if file.is_file() and (file.name == HEAD_FILE or not weights):
            shutil.copy(file, target)
    modules = source / "modules.json"  # a file of sentence-transformers
    for module in json.loads(modules.read_text(encoding="utf-8")) if modules.is_file() else []:
        name = module["path"]  # (empty for the network itself)
        if name and (folder := untrusted.inside(source, name, str(modules))).is_dir():
            shutil.copytree(folder, target / name, symlinks=True)


def save_as(
    network: transformers.PreTrainedModel, changes: dict[str, Any], weights: dict[str, Tensor], target: Path
) -> None:
    """Saves a network with new sizes.

    Args:
        network: The network with the old sizes.
        changes: The settings of its config that change.
        weights: The weights with the new sizes.
        target: Existing folder.

    Raises:
        UserError: If the class of the network does not accept the sizes.
    """
    try:
        config = type(network.config).from_dict(network.config.to_dict() | changes)
        smaller = type(network)(config)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{type(network).__name__} cannot have {changes} ({one_line(error, 200)}): use another share"
        ) from error
    smaller.load_state_dict(weights)
    if network.can_generate():
        smaller.generation_config = network.generation_config
    smaller.save_pretrained(target)


package = partial(errors.package, what="this recipe", extra="compress")
