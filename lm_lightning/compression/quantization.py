"""Quantization: weights of 16 or 32 bits in, of 8 or 4 bits out; and what rounding them does, for training with it."""

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
from lm_lightning.networks import linear_layers


class Rounding(NamedTuple):
    """What a quantization does to the numbers that a layer computes with.

    Attributes:
        weight: Of (outputs, inputs) float makes what the quantized weight stands for, in the same shape.
        input: The same of inputs, (..., inputs); None where they stay as they are.
    """

    weight: Callable[[Tensor], Tensor]
    input: Optional[Callable[[Tensor], Tensor]] = None


class Quantization:
    """A step of a recipe that quantizes the linear layers of the blocks through `transformers`.

    Args:
        device: Where it can be computed, `cuda`, or anywhere.
        linear_only: Whether GPT-2's `Conv1D` is unknown to it.
    """

    device: Optional[str] = None
    linear_only = False

    def config(self, stay: list[str]) -> Any:
        """The quantization config of `transformers`, which leaves layers of these names as they are."""
        raise NotImplementedError

    def done(self, layer: nn.Module) -> bool:
        """Whether a layer is quantized."""
        raise NotImplementedError

    def rounding(self) -> Optional[Rounding]:
        """How it rounds, None if that is not known here."""
        return None

    def check(self, network: nn.Module, value: float, modules: Sequence[str]) -> None:
        """Refuses a network before any work is done.

        Raises:
            UserError: If a layer would be left out, or something is missing.
        """
        self.config([])  # whose packages may be missing
        layers = linear_layers(network, modules)
        odd = [name for name, layer in layers.items() if self.linear_only and isinstance(layer, Conv1D)]
        if odd:
            raise UserError(
                f"this recipe leaves {len(odd)} of {len(layers)} linear layers of {type(network).__name__} as they "
                f"are, such as {odd[0]} (Conv1D): take another one (bnb-int8, nf4 and onnx-int8 know GPT-2's Conv1D)"
            )
        if self.device and not (self.device == "cuda" and torch.cuda.is_available()):
            raise UserError(f"this recipe needs a GPU with {self.device.upper()}: take int8 or nf4 here")

    def __call__(
        self, source: Path, target: Path, value: float, calibration: Optional[Calibration], modules: Sequence[str]
    ) -> None:
        network = load(source)
        self.check(network, value, modules)
        layers = linear_layers(network, modules)
        stay = [name for name, layer in network.named_modules() if isinstance(layer, (nn.Linear, Conv1D))]
        stay = [name for name in stay if name not in layers]
        kind = {"dtype": torch.float32} if self.device is None else {"dtype": torch.bfloat16, "device_map": self.device}
        network = load(source, quantization_config=self.config(stay), **kind)
        found = dict(network.named_modules())
        left = [name for name in layers if not self.done(found[name])]
        if left:
            raise UserError(
                f"this recipe leaves {len(left)} of {len(layers)} linear layers of {type(network).__name__} as they "
                f"are, such as {left[0]} ({type(found[left[0]]).__name__}): take another one"
            )
        network.save_pretrained(target)


class TorchAO(Quantization):
    """By torchao.

    Args:
        name: Of its config.
        device: See `Quantization`.
        settings: Of the config.
    """

    linear_only = True

    def __init__(self, name: str, device: Optional[str] = None, **settings: Any) -> None:
        self.name, self.device, self.settings = name, device, settings

    def of_torchao(self) -> Any:
        """Its config."""
        package("torchao")
        return getattr(package("torchao.quantization"), self.name)(**self.settings)

    def config(self, stay: list[str]) -> Any:
        return transformers.TorchAoConfig(self.of_torchao(), modules_to_not_convert=stay)

    def done(self, layer: nn.Module) -> bool:
        return isinstance(layer.weight, package("torchao.utils").TorchAOBaseTensor)

    def rounding(self) -> Rounding:
        config, quantization = self.of_torchao(), package("torchao.quantization")

        def weight(weight: Tensor) -> Tensor:
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
            quantization.quantize_(layer, config)
            return layer.weight.dequantize()

        def of_rows(inputs: Tensor) -> Tensor:
            return quantization.Int8Tensor.from_hp(inputs, quantization.PerRow()).dequantize()

        return Rounding(weight, of_rows if "DynamicActivationInt8" in self.name else None)


class BitsAndBytes(Quantization):
    """By bitsandbytes.

    Args:
        bits: 8 or 4.
        kind: Of 4 bits, `nf4` or `fp4`; their scales are quantized, too.
    """

    def __init__(self, bits: int, kind: str = "nf4") -> None:
        self.bits, self.kind = bits, kind

    def config(self, stay: list[str]) -> Any:
        package("accelerate")  # with which transformers loads
        package("bitsandbytes")
        settings: dict[str, Any] = {"load_in_8bit": True}
        if self.bits == 4:
            settings = {"load_in_4bit": True, "bnb_4bit_quant_type": self.kind, "bnb_4bit_use_double_quant": True}
        return transformers.BitsAndBytesConfig(llm_int8_skip_modules=stay, **settings)

    def done(self, layer: nn.Module) -> bool:
        modules = package("bitsandbytes").nn
        return isinstance(layer, (modules.Linear4bit, modules.Linear8bitLt))

    def rounding(self) -> Rounding:
        functional = package("bitsandbytes.functional")

        def eight(weight: Tensor) -> Tensor:
            numbers, scales, _ = functional.int8_vectorwise_quant(weight.half())
            return functional.int8_vectorwise_dequant(numbers, scales)

        def eight_of_inputs(inputs: Tensor) -> Tensor:
            rows = inputs.flatten(0, -2).half()
            numbers, scales, large = functional.int8_vectorwise_quant(rows, threshold=6.0)  # that of transformers
            result = functional.int8_vectorwise_dequant(numbers, scales)
            if large is not None:  # columns that are left as they are
                result[:, large] = rows[:, large].float()
            return result.view_as(inputs)

        def four(weight: Tensor) -> Tensor:
            settings = {"blocksize": 64, "compress_statistics": True, "quant_type": self.kind}
            return functional.dequantize_4bit(*functional.quantize_4bit(weight.contiguous(), **settings))

        return Rounding(eight, eight_of_inputs) if self.bits == 8 else Rounding(four)
