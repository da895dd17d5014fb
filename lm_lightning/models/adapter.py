"""Adapters: methods that train a few new tensors in addition to those of a pretrained network, which are frozen.

A checkpoint then contains only the trained tensors and a description of the base, which is loaded from its original
location. An export is a network like any other, into which the adapter is merged; the adapter is also saved by itself.
"""

import dataclasses
import os
from collections.abc import Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Optional

import torch
import transformers
from huggingface_hub import snapshot_download
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from lm_lightning import hub
from lm_lightning.errors import UserError
from lm_lightning.files import checksum
from lm_lightning.security import imports, untrusted


@dataclasses.dataclass
class Adapted:
    """An adapted network that is to be exported.

    Args:
        network: The network.
        weights: Its state dict: full tensors on the CPU.
        record: The description of its adapter, see `record_of`.
        description: The description of the network, see `export.describe`.
    """

    network: transformers.PreTrainedModel
    weights: dict[str, Tensor]
    record: dict[str, Any]
    description: dict[str, Any]


class Adapter:
    """Base class of all adapters; `--model.adapter CLASS` chooses one, with options such as `--model.adapter.rank 8`.

    A subclass is a dataclass. Its fields are its options, JSON-serializable values, which checkpoints contain.

    Attributes:
        training_options: Names of the options that affect training only; a resumed run may change these.
        quantized: Whether the base has tensors of other types than PyTorch's own. Its state dict is then read directly,
            and it is never sharded.
    """

    training_options: ClassVar[tuple[str, ...]] = ()
    quantized = False

    def check(self, strategy: Strategy) -> None:
        """Refuses a strategy with which the adapter does not work, before the base is loaded.

        Raises:
            UserError: Names the strategy and a remedy.
        """

    def loading_options(
        self, skeleton: transformers.PreTrainedModel, device: torch.device, precision: str
    ) -> dict[str, Any]:
        """Additional arguments of `from_pretrained` for loading the base, for example to quantize it.

        Args:
            skeleton: A network of the same sizes on the meta device.
            device: The device on which the network will be.
            precision: The trainer's, such as `bf16-mixed`.
        """
        return {}

    def adapt(self, network: transformers.PreTrainedModel, new: Collection[str]) -> frozenset[str]:
        """Adds the trained tensors to a network, in place, and freezes all others except the new ones.

        Args:
            network: Loaded with `loading_options`.
            new: Names of tensors that the pretrained weights do not have, such as a new head.

        Returns:
            The names, in the adapted network, of all tensors that a checkpoint must contain.
        """
        raise NotImplementedError

    def disabled(self, network: transformers.PreTrainedModel) -> AbstractContextManager[None]:
        """Within this context, an adapted network computes what its base does, except for new tensors."""
        raise NotImplementedError

    def merge(self, adapted: Adapted) -> dict[str, Tensor]:
        """The weights of a network without an adapter and with the same outputs: its state dict, float32 on the CPU."""
        raise NotImplementedError

    def save(self, adapted: Adapted, folder: Path) -> None:
        """Writes the trained tensors to files of their own, in a folder that is created if it does not exist."""
        raise NotImplementedError

    def summary(self, network: transformers.PreTrainedModel) -> str:
        """A short description of what is trained, which is printed when the network has been created."""
        return type(self).__name__


def summary(adapter: Adapter, network: transformers.PreTrainedModel) -> str:
    """Which parameters of an adapted network are trained, and how many, as text."""
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    share = trained / network.num_parameters()
    return f"{adapter.summary(network)}, {trained:,} parameters are trained ({share:.2%})"


def without_base(state: dict[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """The state dict of a `LanguageModule` without the base: the tensors of its network that are not in `own`."""
    own = {f"network.{name}" for name in own}
    return {name: tensor for name, tensor in state.items() if name in own or not name.startswith("network.")}


def record_of(adapter: Adapter, pretrained: str, new: Collection[str]) -> dict[str, Any]:
    """The description of an adapter in a checkpoint, JSON-serializable.

    Returns:
        `class`, its import path; `options`; `pretrained`, folder or Hub name of the base; `checksums` of its weights;
        `new`, names of the tensors that the base lacks.
    """
    return {
        "class": f"{type(adapter).__module__}.{type(adapter).__qualname__}",
        "options": options_of(adapter),
        "pretrained": os.path.abspath(pretrained) if os.path.isdir(pretrained) else pretrained,
        "checksums": checksums(pretrained),
        "new": sorted(new),
    }


def options_of(adapter: Adapter) -> dict[str, Any]:
    """The options of an adapter, sequences as lists."""
    options = {field.name: getattr(adapter, field.name) for field in dataclasses.fields(adapter)}  # type: ignore[arg-type]
    return {name: list(value) if isinstance(value, (list, tuple)) else value for name, value in options.items()}


def from_record(record: dict[str, Any]) -> Adapter:
    """The adapter of a record in a checkpoint.

    Raises:
        UserError: If its class is not an adapter of this project or of a trusted package, or does not accept the
            recorded options.
    """
    return imports.recorded_instance(record, Adapter, "adapter")


def checksums(pretrained: str) -> dict[str, int]:
    """CRC-32 of each file of weights of a folder, or of a Hub model that has been downloaded."""
    folder = Path(pretrained if os.path.isdir(pretrained) else snapshot_download(pretrained, local_files_only=True))
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return {file.name: checksum(file) for file in files}


def flags_of(record: dict[str, Any]) -> str:
    """The options of the command line that choose the adapter of a record."""
    options = " ".join(f"--model.adapter.{name} {value}" for name, value in record["options"].items() if value != [])
    return f"--model.adapter {record['class'].rpartition('.')[2]} {options}".strip()


def refuse_other(saved: Optional[dict[str, Any]], own: Optional[dict[str, Any]], ignored: Collection[str] = ()) -> None:
    """Refuses a checkpoint whose adapter is not that of this run, or belongs to another base.

    Args:
        saved: Its record, None if it has no adapter.
        own: The record of this run.
        ignored: Options that may differ, `training_options`.

    Raises:
        UserError: Names the difference.
    """
    if saved is None or own is None:
        if saved is own:
            return
        raise UserError(
            "the checkpoint has no adapter: omit model.adapter"
            if saved is None
            else f"the checkpoint has an adapter: give --model.pretrained {saved['pretrained']} {flags_of(saved)}"
        )
    if saved["class"] != own["class"]:
        raise UserError(f"the checkpoint's model.adapter is {saved['class']} (here {own['class']}): use the same")
    different = [
        f"{name} {saved['options'].get(name)} (here {value})"
        for name, value in own["options"].items()
        if name not in ignored and saved["options"].get(name) != value
    ]
    if different:
        raise UserError(f"the checkpoint's model.adapter has {', '.join(different)}: use the same")
    if saved["checksums"] != own["checksums"]:
        raise UserError(
            f"the weights of {own['pretrained']} are not those that the checkpoint's adapter was trained on "
            f"(the content of {saved['pretrained']} at that time): give those as model.pretrained"
        )


def restore(checkpoint: dict[str, Any]) -> tuple[Adapter, Adapted]:
    """Loads the base of a checkpoint with an adapter, and adapts it.

    Returns:
        The adapter, and the adapted network with the trained tensors of the checkpoint.

    Raises:
        UserError: If the base no longer exists, or has changed.
    """
    record, description = checkpoint["adapter"], checkpoint["network"]
    adapter, base = from_record(record), record["pretrained"]
    network_class = untrusted.network_class(description["class"])
    config = network_class.config_class.from_dict(description["config"] | {"vocab_size": description["rows"]})
    with torch.device("meta"):
        skeleton = network_class(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        network = network_class.from_pretrained(
            base,
            config=config,
            local_files_only=hub.local_only(base),
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # of a head, which is in the checkpoint
            **adapter.loading_options(skeleton, device, "32-true"),
        )
    except (OSError, ValueError) as error:
        raise UserError(f"the checkpoint's adapter needs its base: {hub.explain(base, error)}") from error
    refuse_other(record, record_of(adapter, base, record["new"]))
    adapter.adapt(network, record["new"])
    own = {k.removeprefix("network."): w for k, w in checkpoint["state_dict"].items() if k.startswith("network.")}
    weights = {name: tensor.cpu() for name, tensor in network.state_dict().items()} | own
    return adapter, Adapted(network, weights, record, description)
