"""Exports: a network's description and weights in, a `from_pretrained` folder out."""

import json
from pathlib import Path
from typing import Any, Optional

import safetensors.torch
import torch
import transformers

from lm_lightning import hub
from lm_lightning.compat.transformers import refused_settings
from lm_lightning.console import printable
from lm_lightning.data.tokenizer import fingerprint, load
from lm_lightning.data.tokenizer import save as save_tokenizer
from lm_lightning.errors import UserError
from lm_lightning.security import untrusted
from lm_lightning.tasks.embedding import modules as embedding

HEAD_FILE = "head.safetensors"  # in an exported folder: weights of a head that `transformers` has not


def generation_config(settings: dict[str, Any]) -> tuple[transformers.GenerationConfig, list[str]]:
    """The generation config of some settings, without those that `transformers` refuses to save.

    Published models have contradictory ones, such as a temperature although nothing is sampled, which have no effect.

    Returns:
        The config; what it lacks of the settings, such as `temperature 0.7`.
    """
    kept, removed = dict(settings), list[str]()
    while True:
        try:
            config = transformers.GenerationConfig.from_dict(kept)
            config.validate(strict=True)
            return config, removed
        except ValueError as error:
            refused = [name for name in refused_settings(error) if kept.get(name) is not None]
            if not refused and not (refused := [name for name in kept if not name.endswith("_token_id")]):
                raise
            removed += [f"{name} {kept.pop(name)}" for name in refused]


def check_export(description: dict[str, Any], tokenizer: transformers.PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes all but the weights of an export, so that whatever is wrong with it is found before training.

    Args:
        description: Of the network; see `LanguageModule.description`.
        tokenizer: That is exported with it.
        folder: To write into, which is there.

    Raises:
        UserError: If the network or its tokenizer could not be exported, or not be read again.
    """
    name = str(description["class"])
    network_class = getattr(transformers, name, None)
    if network_class is None:
        raise UserError(
            f"the network's class {name} is not one of transformers, which therefore could not load model/: use a "
            "network of transformers, or switch the export off with --trainer.enable_checkpointing false"
        )
    save_network(description, None, folder)
    save_tokenizer(tokenizer, folder)
    hub.config(str(folder))
    if fingerprint(load(str(folder))) != fingerprint(tokenizer):
        raise UserError(
            "the tokenizer, saved beside this network, would be read as another one: give the network's own tokenizer "
            "(data.tokenizer.path)"
        )


def save_network(
    description: dict[str, Any], weights: Optional[dict[str, Any]], folder: Path, max_shard_size: Optional[str] = None
) -> None:
    """Writes weights as a `from_pretrained` folder.

    Args:
        description: Of the network to write; see `LanguageModule.description`.
        weights: State dict of the network, whose vocabulary may have more rows: these are padding and are left out.
            What its class does not have is a head of ours and goes into a file of its own. None: all but the weights is
            written.
        folder: Is made if it does not exist.
        max_shard_size: Largest file of weights, such as `5GB`; larger ones are written in parts. Default: that of
            `transformers`.

    Raises:
        UserError: If `max_shard_size` is no size.
    """
    network_class = untrusted.network_class(description["class"])
    with torch.device("meta"):  # the tensors come from `weights`
        network = network_class(network_class.config_class.from_dict(description["config"]))
    if description["generation"] is not None:
        network.generation_config, removed = generation_config(description["generation"])
        if removed:
            names = printable(", ".join(removed))
            print(f"generation_config.json is written without {names}: not valid with its other settings")
    head: dict[str, Any] = {}
    if weights is not None:
        shapes = {key: tensor.shape for key, tensor in network.state_dict().items()}
        head = {key.partition(".")[2]: weights.pop(key) for key in list(weights) if key not in shapes}
        weights = {key: w if w.shape == shapes[key] else w[: shapes[key][0]].clone() for key, w in weights.items()}
        network.load_state_dict(weights, assign=True)
        network.tie_weights()
    files = embedding.files(**description["embedding"]) if "embedding" in description else {}
    try:
        options: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        network.save_pretrained(folder, **options | ({"state_dict": {}} if weights is None else {}))
    except ValueError as error:
        raise UserError(f"the model cannot be written: {error}") from error
    if head:
        safetensors.torch.save_file(head, folder / HEAD_FILE)
    for name, content in files.items():  # whose names never come from the checkpoint
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
