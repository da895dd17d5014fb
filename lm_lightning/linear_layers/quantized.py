"""Quantized linear layers, as `from_pretrained` makes them: configs and checks that adapters and compression share."""

from collections.abc import Collection
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from lm_lightning.errors import UserError, package

Kind = Literal["int8", "nf4", "fp4"]
PACKED = 32  # outputs that bitsandbytes multiplies together on CPUs with bf16


def bitsandbytes_config(
    kind: str, network: nn.Module, layers: Collection[str], what: str, extra: str, **settings: Any
) -> transformers.BitsAndBytesConfig:
    """The config with which `from_pretrained` quantizes some linear layers of a network, and no others.

    Args:
        kind: `int8`, or with 4 bits `nf4` or `fp4`, whose scales are quantized as well.
        network: One of the same class and sizes, whose weights are not needed.
        layers: The names of the layers to quantize.
        what: That needs bitsandbytes, for a message.
        extra: Of this project, which installs it.
        settings: Others of the config.

    Raises:
        UserError: If bitsandbytes, or accelerate, with which transformers loads, is missing.
    """
    package("accelerate", what, extra)
    package("bitsandbytes", what, extra)
    bits: dict[str, Any] = {"load_in_8bit": True}
    if kind != "int8":
        bits = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": True}
    return transformers.BitsAndBytesConfig(llm_int8_skip_modules=other_layers(network, layers), **bits, **settings)


def bitsandbytes_layers() -> tuple[type[nn.Module], ...]:
    """The classes of layers that bitsandbytes has quantized."""
    from bitsandbytes import nn as quantized

    return (quantized.Linear4bit, quantized.Linear8bitLt)


def other_layers(network: nn.Module, layers: Collection[str]) -> list[str]:
    """The names of the linear layers of a network that are not among `layers`, such as those of its head."""
    linear = (name for name, module in network.named_modules() if isinstance(module, (nn.Linear, Conv1D)))
    return [name for name in linear if name not in layers]


def refuse_other_classes(network: nn.Module, layers: Collection[str], classes: Any, what: str, remedy: str) -> None:
    """Refuses a network in which some layers are not of the classes that they should have become.

    A library that replaces layers skips those that it does not know, without a word.

    Args:
        network: After the replacement.
        layers: The names of the layers.
        classes: A class or a tuple of classes.
        what: That has replaced them, for the message.
        remedy: For the message.

    Raises:
        UserError: Names the first of them.
    """
    modules = dict(network.named_modules())
    refuse_skipped(network, layers, [name for name in layers if not isinstance(modules[name], classes)], what, remedy)


def refuse_skipped(network: nn.Module, layers: Collection[str], skipped: list[str], what: str, remedy: str) -> None:
    """Refuses a network if layers were, or would be, skipped; see `refuse_other_classes`."""
    if skipped:
        kind = type(dict(network.named_modules())[skipped[0]]).__name__
        raise UserError(
            f"{what} skips {len(skipped)} of {len(layers)} linear layers of {type(network).__name__}, such as "
            f"{skipped[0]} ({kind}): {remedy}"
        )


def refuse_unpackable(network: nn.Module, layers: dict[str, nn.Linear], what: str, remedy: str) -> None:
    """Refuses layers whose 4 bits bitsandbytes could not multiply on this machine.

    On CPUs with bf16, it packs the weights of so many outputs together in the first evaluation.

    Raises:
        UserError: Names the first of them.
    """
    functional = package("bitsandbytes.functional", what, "compress")
    if torch.cuda.is_available() or not getattr(functional, "has_avx512bf16", lambda: False)():
        return
    for name, layer in layers.items():
        outputs = layer.nf if isinstance(layer, Conv1D) else layer.out_features
        if outputs % PACKED:
            raise UserError(
                f"{what} needs linear layers whose outputs are a multiple of {PACKED} on this CPU, since bitsandbytes "
                f"packs {PACKED} of them together, but {name} of {type(network).__name__} has {outputs}: {remedy}"
            )
