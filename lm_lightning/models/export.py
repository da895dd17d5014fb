"""Exports: a network's description and weights in, a `from_pretrained` folder out."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Optional

import safetensors.torch
import torch
import transformers
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from lm_lightning import features, files, hub
from lm_lightning.compat.transformers import refused_settings
from lm_lightning.console import printable
from lm_lightning.data.tokenizer import fingerprint, load
from lm_lightning.data.tokenizer import save as save_tokenizer
from lm_lightning.errors import UserError
from lm_lightning.models.adapter import Adapted, Adapter, restore
from lm_lightning.run import TRAINING
from lm_lightning.security import imports, untrusted

HEAD_FILE = "head.safetensors"  # in an exported folder: weights of a head that `transformers` does not have


class ExtraFiles:
    """Base class of additional files of an exported network, for other programs that load it.

    A subclass is a dataclass whose fields are JSON-serializable: checkpoints contain them, so that `export` can write
    the files. The names of the files are never read from a checkpoint.
    """

    def files(self) -> dict[str, Any]:
        """The content of each JSON file, by its path in the folder."""
        raise NotImplementedError


LIVE: dict[str, type[ExtraFiles]] = {}  # classes of this process's models, by import path: these need no trust


def describe(
    network: transformers.PreTrainedModel,
    class_name: str,
    vocab_size: int,
    pad_token_id: Optional[int],
    extra: Optional[ExtraFiles] = None,
) -> dict[str, Any]:
    """Everything that is needed to create a network again, except the weights, JSON-serializable.

    Args:
        network: The network, perhaps sharded or adapted.
        class_name: Its class in `transformers`.
        vocab_size: Number of tokens; the network may have more rows, which are not exported.
        pad_token_id: Padding token of the tokenizer.
        extra: Additional files to write.

    Returns:
        `class`, its class; `config` and `generation` (None for networks that do not generate), as they are exported;
        `rows`, the number of rows of its vocabulary; `extra`, class and options of `ExtraFiles`, if there are any.
    """
    config, generation = network.config.to_dict(), getattr(network, "generation_config", None)
    config.pop("quantization_config", None)  # of an adapter's base; exports are not quantized
    if config.get("decoder_vocab_size") is not None:  # of Marian
        config["decoder_vocab_size"] = vocab_size
    description = {
        "class": class_name,
        "config": config | {"vocab_size": vocab_size, "pad_token_id": pad_token_id},
        "generation": None if generation is None else generation.to_dict(),
        "rows": network.config.vocab_size,
    }
    if extra is not None:
        path = f"{type(extra).__module__}.{type(extra).__qualname__}"
        description["extra"] = {"class": path, "options": dataclasses.asdict(extra)}  # type: ignore[call-overload]
        LIVE[path] = type(extra)
    return description


class ChangesExport(Callback):
    """Base class of callbacks that change an exported model, for example remove pruned units.

    They do so at the end of training, and when `export` converts a checkpoint, which contains their state.
    """

    @classmethod
    def change_export(cls, folder: Path, state: dict[str, Any]) -> None:
        """Changes an exported model.

        Args:
            folder: `from_pretrained` folder, which is changed in place.
            state: The value of `state_dict`. If it is from a checkpoint, it is untrusted.
        """
        raise NotImplementedError

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        path = f"{type(self).__module__}.{type(self).__qualname__}"
        checkpoint.setdefault("export_changes", {})[self.state_key] = path


Changes = Sequence[tuple[type[ChangesExport], dict[str, Any]]]


def changes_of(checkpoint: dict[str, Any]) -> Changes:
    """The callbacks in a checkpoint that change an export, with their states.

    Raises:
        UserError: If the checkpoint names a class that is neither of this project nor of a trusted package.
    """
    paths = checkpoint.get("export_changes", {})
    return [
        (imports.recorded_class(path, ChangesExport, "callback"), checkpoint["callbacks"][key])
        for key, path in paths.items()
    ]


@dataclasses.dataclass
class Model:
    """A network that is to be exported, in one process.

    Args:
        description: See `describe`.
        weights: State dict of the network without an adapter: full tensors on the CPU.
        tokenizer: Its tokenizer, which is written to the same folder; None if there is none.
        save_adapter: Writes the adapter into a folder; None if the network has none.
    """

    description: dict[str, Any]
    weights: dict[str, Any]
    tokenizer: Optional[transformers.PreTrainedTokenizerBase]
    save_adapter: Optional[Callable[[Path], None]] = None

    def write(
        self,
        folder: Path,
        about: Optional[dict[str, Any]] = None,
        changes: Changes = (),
        adapter: Optional[Path] = None,
        max_shard_size: Optional[str] = None,
        check: bool = False,
    ) -> None:
        """Writes a `from_pretrained` folder, which is complete or absent, and replaces an earlier one.

        Args:
            folder: The folder.
            about: Checkpoint, step and score of the weights, for `training.json`.
            changes: Callbacks that change the folder.
            adapter: Folder for the adapter, if there is one.
            max_shard_size: See `save_network`.
            check: Whether to check that the exported network has the same logits, which needs memory for two networks.

        Raises:
            UserError: If another network or tokenizer would be loaded from the folder.
        """
        with files.replacing_folder(folder) as partial:
            write_folder(self.description, self.weights, self.tokenizer, partial, max_shard_size)
            for callback, state in changes:
                callback.change_export(partial, state)
            if check:
                check_logits(self.description, self.weights, partial)
            if about is not None:
                files.write_text(partial / TRAINING, json.dumps(about, indent=2))
        if adapter is not None and self.save_adapter is not None:
            with files.replacing_folder(adapter) as partial:
                self.save_adapter(partial)


@dataclasses.dataclass
class Exporter:
    """Prepares the network of a run for export.

    Args:
        network: The network, perhaps sharded or adapted.
        description: See `describe`.
        tokenizer: The data's tokenizer, if it has one.
        adapter: The network's adapter, if it has one.
        record: The description of the adapter, see `adapter.record_of`.
        first: Whether this is the first process, the one that writes.
    """

    network: transformers.PreTrainedModel
    description: dict[str, Any]
    tokenizer: Optional[transformers.PreTrainedTokenizerFast]
    adapter: Optional[Adapter]
    record: Optional[dict[str, Any]]
    first: bool

    def model(self, saved: Optional[dict[str, Any]] = None) -> Optional[Model]:
        """The network as it is now, in the first process; None in the others, which must call this, too.

        Where the weights are sharded, the first process gathers them in the host's memory.

        Args:
            saved: A checkpoint of this network, whose weights are used instead of the current ones.
        """
        weights = self.weights(saved)
        if not self.first:
            return None
        if self.adapter is None or self.record is None:
            return Model(self.description, weights, self.tokenizer)
        adapted = Adapted(self.network, weights, self.record, self.description)
        return adapted_model(self.adapter, adapted, self.tokenizer)

    def weights(self, saved: Optional[dict[str, Any]]) -> dict[str, Any]:
        """The state dict, or that of a checkpoint: full tensors on the CPU, in the first process."""
        weights = network_weights(saved) if saved else {}
        if saved is not None and self.adapter is None:
            return weights
        if self.adapter is not None and self.adapter.quantized:  # never sharded, and its tensors are not PyTorch's
            return {name: tensor.cpu() for name, tensor in self.network.state_dict().items()} | weights
        full = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(self.network, options=full) | weights  # (a checkpoint of an adapter lacks the base)


def adapted_model(
    adapter: Adapter, adapted: Adapted, tokenizer: Optional[transformers.PreTrainedTokenizerBase]
) -> Model:
    """The model of an adapted network, into whose weights the adapter is merged."""
    return Model(adapted.description, adapter.merge(adapted), tokenizer, partial(adapter.save, adapted))


def model_of(saved: dict[str, Any], tokenizer: Optional[transformers.PreTrainedTokenizerBase]) -> Model:
    """The model in a checkpoint; the base of an adapter is loaded from its original location.

    Args:
        saved: The checkpoint.
        tokenizer: The tokenizer of its run, if the data has one.
    """
    if "adapter" not in saved:
        return Model(saved["network"], network_weights(saved), tokenizer)
    return adapted_model(*restore(saved), tokenizer)


def network_weights(saved: dict[str, Any]) -> dict[str, Any]:
    """The state dict of the network in a checkpoint."""
    weights = saved["state_dict"].items()
    return {name.removeprefix("network."): tensor for name, tensor in weights if name.startswith("network.")}


def generation_config(settings: dict[str, Any]) -> tuple[transformers.GenerationConfig, list[str]]:
    """The generation config with these settings, except for those that `transformers` refuses to save.

    Published models have contradictory settings, such as a temperature without sampling, which have no effect.

    Returns:
        The config, and the omitted settings, such as `temperature 0.7`.
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
        description: The description of the network, see `describe`.
        tokenizer: The tokenizer that is exported with it, if there is one.
        folder: An existing folder to write into.

    Raises:
        UserError: If the network or its tokenizer could not be exported, or could not be loaded again.
    """
    name = str(description["class"])
    if getattr(transformers, name, None) is None and name not in features.networks():
        raise UserError(
            f"the network's class {name} is not part of transformers, which could therefore not load model/: use a "
            "network of transformers, or disable the export with --trainer.enable_checkpointing false"
        )
    write_folder(description, None, tokenizer, folder)
    hub.config(str(folder))


def write_folder(
    description: dict[str, Any],
    weights: Optional[dict[str, Any]],
    tokenizer: Optional[transformers.PreTrainedTokenizerBase],
    folder: Path,
    max_shard_size: Optional[str] = None,
) -> None:
    """Writes a network, see `save_network`, and its tokenizer.

    Raises:
        UserError: As `save_network`, or if the tokenizer would be loaded as a different one.
    """
    save_network(description, weights, folder, max_shard_size)
    if tokenizer is None:
        return
    save_tokenizer(tokenizer, folder)
    if fingerprint(load(str(folder))) != fingerprint(tokenizer):
        raise UserError(
            "for this network, transformers would load the saved tokenizer as a different one: give the network's own "
            "tokenizer (data.tokenizer.path)"
        )


def trimmed(weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A tensor without the additional rows or columns of padding of the vocabulary."""
    return weight[tuple(slice(size) for size in shape)].clone()


@torch.no_grad()
def check_logits(description: dict[str, Any], weights: dict[str, Any], folder: Path) -> None:
    """Checks that an exported network computes the same logits as the weights from which it was written.

    Args:
        description: See `describe`.
        weights: The state dict of the network.
        folder: `from_pretrained` folder.

    Raises:
        UserError: If it does not.
    """
    network_class = untrusted.network_class(description["class"])
    config = network_class.config_class.from_dict(description["config"])
    tokens = torch.arange(min(16, config.vocab_size)).unsqueeze(0)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    after = network_class.from_pretrained(folder).eval()(**inputs)[0]
    config.vocab_size = description["rows"]
    network = network_class(config).eval()
    network.load_state_dict({key: weights[key] for key in network.state_dict()})  # (not a head of this project)
    before = network(**inputs)[0][..., : after.shape[-1]]
    difference = (before - after).abs().max().item()
    if not difference < 1e-5:
        raise UserError(
            f"the exported model's outputs differ from the checkpoint's by {difference:.2g}: nothing is exported"
        )


def save_network(
    description: dict[str, Any], weights: Optional[dict[str, Any]], folder: Path, max_shard_size: Optional[str] = None
) -> None:
    """Writes weights as a `from_pretrained` folder.

    Args:
        description: The description of the network, see `describe`.
        weights: State dict of the network. Additional rows of its vocabulary are padding and are not written. Tensors
            that its class lacks belong to a head of this project, and get a file of their own. None: everything but the
            weights is written.
        folder: The folder, which is created if it does not exist.
        max_shard_size: Maximum size of a weights file, such as `5GB`; larger weights are split into several files.
            Default: the one of `transformers`.

    Raises:
        UserError: If `max_shard_size` is not a size, or the description names classes that are not trusted.
    """
    network_class = untrusted.network_class(description["class"])
    with torch.device("meta"):  # its tensors are replaced by those of `weights`
        network = network_class(network_class.config_class.from_dict(description["config"]))
    if description["generation"] is not None:
        network.generation_config, removed = generation_config(description["generation"])
        if removed:
            names = printable(", ".join(removed))
            print(f"generation_config.json is written without {names}, which contradicts its other settings")
    head: dict[str, Any] = {}
    if weights is not None:
        shapes = {key: tensor.shape for key, tensor in network.state_dict().items()}
        head = {key.partition(".")[2]: weight for key, weight in weights.items() if key not in shapes}
        own = {key: weight for key, weight in weights.items() if key in shapes}
        own = {key: w if w.shape == shapes[key] else trimmed(w, shapes[key]) for key, w in own.items()}
        network.load_state_dict(own, assign=True)
        network.tie_weights()
    contents: dict[str, Any] = {}
    if extra := description.get("extra"):
        contents = imports.recorded_instance(extra, ExtraFiles, "class of files", LIVE).files()
    try:
        options: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        network.save_pretrained(folder, **options | ({"state_dict": {}} if weights is None else {}))
    except ValueError as error:
        raise UserError(f"the model cannot be written: {error}") from error
    if head:
        safetensors.torch.save_file(head, folder / HEAD_FILE)
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
