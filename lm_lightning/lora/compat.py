"""peft, bitsandbytes and transformers: quantized layers, and the names of the tensors of an adapter."""

from typing import Any, Optional

from torch import Tensor, nn

# Names of the tensors of an adapted layer. peft's own files have them, too, so they are stable. Alternative:
# `peft.get_peft_model_state_dict`, which needs a network that holds the weights, while an export has only tensors.
BASE_LAYER = "{}.base_layer"
MATRIX = "{}.lora_{}.default.weight"
IN_FILES = "base_model.model.{}"  # in adapter_model.safetensors, where the adapter has no name


def matrices(name: str, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A, (rank, inputs), and B, (outputs, rank), of the adapted layer of a name."""
    return weights[MATRIX.format(name, "A")], weights[MATRIX.format(name, "B")]


def is_matrix(name: str) -> bool:
    """Whether a name is that of a matrix of an adapter."""
    return ".lora_" in name


def name_in_files(name: str) -> str:
    """The name of a tensor of a network in peft's files."""
    return IN_FILES.format(name.replace(".default.", "."))


def original_class(layer: nn.Module) -> Optional[type]:
    """The class of a layer before it was quantized; None if it is not quantized.

    transformers notes it. Alternative: none that knows GPT-2's `Conv1D`, whose matrix was transposed.
    """
    return getattr(layer, "source_cls", None)


def dequantized(layer: nn.Module) -> Tensor:
    """The matrix of a quantized layer, (outputs, inputs) float32 on the CPU.

    Alternative: `bitsandbytes.functional.dequantize_4bit`, and code of our own for 8 bits; or `network.dequantize()` of
    transformers, which changes the network that is still in training.
    """
    from peft.utils.integrations import dequantize_bnb_weight

    return dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)).float().cpu()  # type: ignore[arg-type]


def keep_trainable(network: Any) -> None:
    """Has layers of 4 bits not repack their weights in an evaluation on a CPU with bf16: they cannot train after it.

    Alternative: none, bitsandbytes has no switch.
    """
    for module in network.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
