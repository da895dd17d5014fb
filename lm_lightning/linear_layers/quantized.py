"""Linear layers that `from_pretrained` quantizes: configs and checks that adapters and compression share."""

from collections.abc import Collection
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from lm_lightning.errors import UserError, package

Kind = Literal["int8", "nf4", "fp4"]
PACKED = 32  # number of outputs that bitsandbytes packs together on CPUs with bf16 instructions


def bitsandbytes_config(
    kind: str, network: nn.Module, layers: Collection[str], what: str, extra: str, **settings: Any
) -> transformers.BitsAndBytesConfig:
    """The config with which `from_pretrained` quantizes some linear layers of a network, and no others.

    Args:
        kind: `int8`, or a 4-bit type, `nf4` or `fp4`, whose scales are quantized as well.
        network: A network of the same class and sizes; its weights are not used.
        layers: The names of the layers to quantize.
        what: The option or feature that needs bitsandbytes, for a message.
        extra: The extra of this project that installs bitsandbytes.
        settings: Other settings of the config.

    Raises:
        UserError: If bitsandbytes is missing, or accelerate, which transformers needs to load it.
    """
    package("accelerate", what, extra)
    package("bitsandbytes", what, extra)
    bits: dict[str, Any] = {"load_in_8bit": True}
    if kind != "int8":
        bits = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": True}
    return transformers.BitsAndBytesConfig(llm_int8_skip_modules=other_layers(network, layers), **bits, **settings)


def bitsandbytes_layers() -> tuple[type[nn.Module], ...]:
    """The classes of the layers that bitsandbytes quantizes."""
    from bitsandbytes import nn as quantized

    return (quantized.Linear4bit, quantized.Linear8bitLt)


def other_layers(network: nn.Module, layers: Collection[str]) -> list[str]:
    """The names of the linear layers of a network that are not among `layers`, such as those of its head."""
    linear = (name for name, module in network.named_modules() if isinstance(module, (nn.Linear, Conv1D)))
    return [name for name in linear if name not in layers]


def refuse_other_classes(network: nn.Module, layers: Collection[str], classes: Any, what: str, remedy: str) -> None:
    """Refuses a network in which some layers were not replaced by layers of the expected classes.

    A library that replaces layers silently skips those that it does not support.

    Args:
        network: After the replacement.
        layers: The names of the layers.
        classes: The expected class, or a tuple of classes.
        what: What replaces the layers, for the message.
        remedy: What the user can do, for the message.

    Raises:
        UserError: Names the first such layer.
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
    """Refuses layers that bitsandbytes could not compute with 4 bits on this machine.

    On CPUs with bf16 instructions, it packs the weights of `PACKED` outputs together at the first evaluation.

    Raises:
        UserError: Names the first such layer.
    """
    functional = package("bitsandbytes.functional", what)
    if torch.cuda.is_available() or not getattr(functional, "has_avx512bf16", lambda: False)():
        return
    for name, layer in layers.items():
        outputs = layer.nf if isinstance(layer, Conv1D) else layer.out_features
        if outputs % PACKED:
            raise UserError(
                f"{what} needs linear layers whose number of outputs is a multiple of {PACKED} on this CPU, as "
                f"bitsandbytes packs {PACKED} of them together, but {name} of {type(network).__name__} has {outputs}: "
                f"{remedy}"
            )
