"""Exports: a network's description and weights in, a `from_pretrained` folder out."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Optional

import safetensors.torch
import torch
import transformers
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from lm_lightning import hub
from lm_lightning.compat.transformers import refused_settings
from lm_lightning.console import printable
from lm_lightning.data.tokenizer import fingerprint, load
from lm_lightning.data.tokenizer import save as save_tokenizer
from lm_lightning.errors import UserError
from lm_lightning.models.adapter import Adapter
from lm_lightning.security import imports, untrusted

HEAD_FILE = "head.safetensors"  # in an exported folder: weights of a head that `transformers` does not have


class ExtraFiles:
    """Base of what a model writes beside an exported network, for other programs that load it.

    A subclass is a dataclass whose fields are JSON-able: checkpoints keep them, so that `export` can write the files.
    Names of files are never taken from a checkpoint.
    """

    def files(self) -> dict[str, Any]:
        """The content of each JSON file, by its path in the folder."""
        raise NotImplementedError


def describe(
    network: transformers.PreTrainedModel,
    class_name: str,
    vocab_size: int,
    pad_token_id: Optional[int],
    extra: Optional[ExtraFiles] = None,
) -> dict[str, Any]:
    """All that is needed to make a network again, except the weights, JSON-able.

    Args:
        network: The network, perhaps sharded or adapted.
        class_name: Its class in `transformers`.
        vocab_size: Tokens; the network may have more rows, which are not exported.
        pad_token_id: Of the tokenizer.
        extra: Files to write beside it.

    Returns:
        `class`, its class; `config` and `generation` (None for networks that do not generate), as they are exported;
        `rows`, the network's own number of tokens; `extra`, class and options of `ExtraFiles`, if there are any.
    """
    config, generation = network.config.to_dict(), getattr(network, "generation_config", None)
    config.pop("quantization_config", None)  # of an adapter's base; exports are not quantized
    description = {
        "class": class_name,
        "config": config | {"vocab_size": vocab_size, "pad_token_id": pad_token_id},
        "generation": None if generation is None else generation.to_dict(),
        "rows": network.config.vocab_size,
    }
    if extra is not None:
        path = f"{type(extra).__module__}.{type(extra).__qualname__}"
        description["extra"] = {"class": path, "options": dataclasses.asdict(extra)}  # type: ignore[call-overload]
    return description


@dataclasses.dataclass
class Exporter:
    """Writes the network of a run; all processes call its methods.

    Where the weights are sharded, the first process gathers them in the host's memory.

    Args:
        network: The network, perhaps sharded or adapted.
        description: See `describe`.
        tokenizer: Is written beside the network, if there is one.
        adapter: Of the network, if it has one.
        record: Of the adapter, see `adapter.record_of`.
        first: Whether this is the first process, the one that writes.
    """

    network: transformers.PreTrainedModel
    description: dict[str, Any]
    tokenizer: Optional[transformers.PreTrainedTokenizerFast]
    adapter: Optional[Adapter]
    record: Optional[dict[str, Any]]
    first: bool

    def write(self, folder: Path, saved: Optional[dict[str, Any]] = None) -> None:
        """Writes the network and its tokenizer as a `from_pretrained` folder.

        Args:
            folder: Is created if it does not exist.
            saved: A checkpoint of this network, whose weights are written instead of the present ones.
        """
        weights = self.weights(saved)
        if not self.first:
            return
        if self.adapter is not None:
            weights = self.adapter.merge(self.network, weights)
        save_network(self.description, weights, folder)
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, folder)

    def write_adapter(self, folder: Path, saved: Optional[dict[str, Any]] = None) -> None:
        """Writes what the adapter has trained as its own files.

        Args:
            folder: As in `write`.
            saved: As in `write`.
        """
        weights = self.weights(saved)
        if self.adapter is not None and self.record is not None and self.first:
            self.adapter.save(self.network, weights, self.record, self.description, folder)

    def weights(self, saved: Optional[dict[str, Any]]) -> dict[str, Any]:
        """The state dict, or that of a checkpoint: full tensors on the CPU, in the first process."""
        weights = saved["state_dict"] if saved else {}
        weights = {name.removeprefix("network."): w for name, w in weights.items() if name.startswith("network.")}
        if saved is not None and self.adapter is None:
            return weights
        if self.adapter is not None and self.adapter.quantized:  # never sharded, and its tensors are not PyTorch's
            return {name: tensor.cpu() for name, tensor in self.network.state_dict().items()} | weights
        full = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(self.network, options=full) | weights  # (checkpoints of adapters lack the base)


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


def check_export(
    description: dict[str, Any], tokenizer: Optional[transformers.PreTrainedTokenizerFast], folder: Path
) -> None:
    """Writes all but the weights of an export, so that problems are found before training.

    Args:
        description: Of the network, see `describe`.
        tokenizer: That is exported with it, if there is one.
        folder: An existing folder to write into.

    Raises:
        UserError: If the network or its tokenizer could not be exported, or not be loaded again.
    """
    name = str(description["class"])
    if getattr(transformers, name, None) is None:
        raise UserError(
            f"the network's class {name} is not one of transformers, which therefore could not load model/: use a "
            "network of transformers, or switch the export off with --trainer.enable_checkpointing false"
        )
    save_network(description, None, folder)
    hub.config(str(folder))
    if tokenizer is None:
        return
    save_tokenizer(tokenizer, folder)
    if fingerprint(load(str(folder))) != fingerprint(tokenizer):
        raise UserError(
            "the tokenizer, saved beside this network, would be loaded as another one: give the network's own "
            "tokenizer (data.tokenizer.path)"
        )


def save_network(
    description: dict[str, Any], weights: Optional[dict[str, Any]], folder: Path, max_shard_size: Optional[str] = None
) -> None:
    """Writes weights as a `from_pretrained` folder.

    Args:
        description: Of the network, see `describe`.
        weights: State dict of the network. Additional rows of its vocabulary are padding and are not written. Tensors
            that its class does not have are those of a head of this project, which get a file of their own. None:
            everything but the weights is written.
        folder: Is created if it does not exist.
        max_shard_size: Largest file of weights, such as `5GB`; larger ones are written in parts. Default: that of
            `transformers`.

    Raises:
        UserError: If `max_shard_size` is no size, or the description names classes that are not trusted.
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
    files: dict[str, Any] = {}
    if extra := description.get("extra"):
        files = imports.recorded_class(extra["class"], ExtraFiles, "class of files")(**extra["options"]).files()
    try:
        options: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        network.save_pretrained(folder, **options | ({"state_dict": {}} if weights is None else {}))
    except ValueError as error:
        raise UserError(f"the model cannot be written: {error}") from error
    if head:
        safetensors.torch.save_file(head, folder / HEAD_FILE)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
