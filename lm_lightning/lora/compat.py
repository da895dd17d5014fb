"""peft, bitsandbytes and transformers: quantized layers, and the names of the tensors of an adapter."""

from collections.abc import Iterable
from typing import Any, Optional

from torch import Tensor, nn

# Names of the tensors of an adapted layer. They are stable, since they are also used in peft's files. Alternative:
# `peft.get_peft_model_state_dict`, which needs a network with the weights, while an export has only tensors.
BASE_LAYER = "{}.base_layer"
MATRIX = "{}.lora_{}.default.weight"
IN_FILES = "base_model.model.{}"  # in adapter_model.safetensors, which does not contain the adapter's name


def matrices(name: str, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A, (rank, inputs), and B, (outputs, rank), of the adapted layer with this name."""
    return weights[MATRIX.format(name, "A")], weights[MATRIX.format(name, "B")]


def is_matrix(name: str) -> bool:
    """Whether a name is the name of a matrix of an adapter."""
    return ".lora_" in name


def name_in_files(name: str) -> str:
    """The name of a tensor of a network in peft's files."""
    return IN_FILES.format(name.replace(".default.", "."))


def original_class(layer: nn.Module) -> Optional[type]:
    """The class of a layer before it was quantized; None if it is not quantized.

    transformers saves it in the layer. Alternative: none that supports GPT-2's `Conv1D`, whose matrix was transposed.
    """
    return getattr(layer, "source_cls", None)


def dequantized(layer: nn.Module) -> Tensor:
    """The matrix of a quantized layer, (outputs, inputs) float32 on the CPU.

    Alternative: `bitsandbytes.functional.dequantize_4bit`, and our own code for 8 bits; or `network.dequantize()` of
    transformers, which would change the network while it is trained.
    """
    from peft.utils.integrations import dequantize_bnb_weight

    return dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)).float().cpu()  # type: ignore[arg-type]


def keep_trainable(network: Any) -> None:
    """Prevents 4-bit layers from repacking their weights in evaluations on CPUs with bf16, which prevents training.

    Alternative: none, bitsandbytes has no switch.
    """
    for module in network.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def set_disabled(layers: Iterable[Any], disabled: bool) -> None:
    """Makes adapted layers compute what their base layers do, or lets them use their matrices again.

    Alternative: `LoraLayer.enable_adapters`, which also changes `requires_grad` of the matrices, which DDP does not
    expect in the middle of a step.
    """
    for layer in layers:
        layer._disable_adapters = disabled
