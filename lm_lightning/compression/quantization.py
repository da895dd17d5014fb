"""Quantization: converts weights to 8 or 4 bits, and defines their rounding for quantization-aware training."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lm_lightning.compression.calibration import Calibration
from lm_lightning.compression.folder import load, package
from lm_lightning.errors import UserError
from lm_lightning.linear_layers.blocks import linear_layers
from lm_lightning.linear_layers.quantized import (
    Kind,
    bitsandbytes_config,
    bitsandbytes_layers,
    other_layers,
    refuse_other_classes,
    refuse_skipped,
    refuse_unpackable,
)

THIS = "this recipe"
ANOTHER = "use another recipe"


class Rounding(NamedTuple):
    """How a quantization rounds the weights and inputs of a layer.

    Attributes:
        weight: Converts a weight, (outputs, inputs) float, to the values of the quantized weight, of the same shape.
        input: The same for inputs, (..., inputs); None if they are not quantized.
    """

    weight: Callable[[Tensor], Tensor]
    input: Optional[Callable[[Tensor], Tensor]] = None


def quantize(source: Path, target: Path, config: Any, device: Optional[str]) -> nn.Module:
    """Loads the network of a folder with a quantization config of `transformers`, and saves it.

    Args:
        source: `from_pretrained` folder.
        target: Existing folder.
        config: The config.
        device: Device on which the weights are computed; None for the CPU.

    Returns:
        The quantized network.
    """
    kind = {"dtype": torch.float32} if device is None else {"dtype": torch.bfloat16, "device_map": device}
    network = load(source, quantization_config=config, **kind)
    network.save_pretrained(target)
    return network


class TorchAO:
    """Quantizes the linear layers of the blocks with torchao.

    Args:
        name: Name of the config class.
        device: `cuda` if it can only be computed on GPUs.
        settings: Settings of the config.
    """

    def __init__(self, name: str, device: Optional[str] = None, **settings: Any) -> None:
        self.name, self.device, self.settings = name, device, settings

    def config(self) -> Any:
        """The config of torchao."""
        package("torchao")
        return getattr(package("torchao.quantization"), self.name)(**self.settings)

    def check(self, network: nn.Module, value: float, modules: Sequence[str]) -> None:
        """Refuses a network before any work is done.

        Raises:
            UserError: If torchao is missing or would skip a layer, or there is no GPU.
        """
        self.config()
        layers = linear_layers(network, modules)
        skipped = [name for name, layer in layers.items() if isinstance(layer, Conv1D)]
        refuse_skipped(
            network, layers, skipped, THIS, f"{ANOTHER} (bnb-int8, nf4 and onnx-int8 support GPT-2's Conv1D)"
        )
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("this recipe needs a CUDA GPU: use int8 or nf4 on this machine")

    def __call__(
        self, source: Path, target: Path, value: float, calibration: Optional[Calibration], modules: Sequence[str]
    ) -> None:
        network = load(source)
        self.check(network, value, modules)
        layers = linear_layers(network, modules)
        config = transformers.TorchAoConfig(self.config(), modules_to_not_convert=other_layers(network, layers))
        quantized = dict(quantize(source, target, config, self.device).named_modules())
        kind = package("torchao.utils").TorchAOBaseTensor
        skipped = [name for name in layers if not isinstance(quantized[name].weight, kind)]
        refuse_skipped(network, layers, skipped, THIS, ANOTHER)

    def rounding(self) -> Rounding:
        """The rounding of this quantization."""
        config, quantization = self.config(), package("torchao.quantization")

        def round_weight(weight: Tensor) -> Tensor:
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
            quantization.quantize_(layer, config)
            return layer.weight.dequantize()

        def round_rows(inputs: Tensor) -> Tensor:
            return quantization.Int8Tensor.from_hp(inputs, quantization.PerRow()).dequantize()

        return Rounding(round_weight, round_rows if "DynamicActivationInt8" in self.name else None)


class BitsAndBytes:
    """Quantizes the linear layers of the blocks with bitsandbytes.

    Args:
        kind: `int8`, or a 4-bit type, `nf4` or `fp4`, whose scales are quantized as well.
    """

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def check(self, network: nn.Module, value: float, modules: Sequence[str]) -> None:
        """Refuses a network before any work is done.

        Raises:
            UserError: If bitsandbytes is missing, or cannot compute a layer on this machine.
        """
        layers = linear_layers(network, modules)
        self.config(network, layers)
        if self.kind != "int8":
            refuse_unpackable(network, layers, f"the recipe {self.kind}", "use bnb-int8, or int8, here")

    def config(self, network: nn.Module, layers: dict[str, nn.Linear]) -> transformers.BitsAndBytesConfig:
        """The config of `transformers` for these layers of a network."""
        return bitsandbytes_config(self.kind, network, layers, THIS, "compress")

    def __call__(
        self, source: Path, target: Path, value: float, calibration: Optional[Calibration], modules: Sequence[str]
    ) -> None:
        network = load(source)
        self.check(network, value, modules)
        layers = linear_layers(network, modules)
        quantized = quantize(source, target, self.config(network, layers), None)
        refuse_other_classes(quantized, layers, bitsandbytes_layers(), THIS, ANOTHER)

    def rounding(self) -> Rounding:
        """The rounding of this quantization."""
        functional = package("bitsandbytes.functional")

        def int8_weight(weight: Tensor) -> Tensor:
            numbers, scales, _ = functional.int8_vectorwise_quant(weight.half())
            return functional.int8_vectorwise_dequant(numbers, scales)

        def int8_inputs(inputs: Tensor) -> Tensor:
            rows = inputs.flatten(0, -2).half()
            numbers, scales, large = functional.int8_vectorwise_quant(rows, threshold=6.0)  # default of transformers
            result = functional.int8_vectorwise_dequant(numbers, scales)
            if large is not None:  # columns that are not quantized
                result[:, large] = rows[:, large].float()
            return result.view_as(inputs)

        def four_bits(weight: Tensor) -> Tensor:
            settings = {"blocksize": 64, "compress_statistics": True, "quant_type": self.kind}
            return functional.dequantize_4bit(*functional.quantize_4bit(weight.contiguous(), **settings))

        return Rounding(int8_weight, int8_inputs) if self.kind == "int8" else Rounding(four_bits)
