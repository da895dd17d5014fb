"""LoRA: trains small matrices that are added to the frozen ones of a pretrained network.

The exported network has the sums of both, like any other network; an additional folder has the adapter for peft.
"""

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import safetensors.torch
import torch
import transformers
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lm_lightning import errors
from lm_lightning.errors import UserError
from lm_lightning.linear_layers.blocks import linear_layers
from lm_lightning.linear_layers.quantized import bitsandbytes_config, bitsandbytes_layers, refuse_other_classes
from lm_lightning.lora import compat
from lm_lightning.models.adapter import Adapted, Adapter
from lm_lightning.models.export import HEAD_FILE
from lm_lightning.security import untrusted
from lm_lightning.strategies.capabilities import capabilities

package = partial(errors.package, what="the adapter LoRA", extra="lora")
COMPUTE = {"bf16": torch.bfloat16, "16": torch.float16}  # precision of the trainer -> dtype of a quantized base


@dataclass
class LoRA(Adapter):
    """Trains low-rank matrices that are added to the frozen ones of a pretrained network.

    The matrix W of a layer, (outputs, inputs), becomes W + alpha / rank * B A, with B (outputs, rank) and A (rank,
    inputs); B is initially zero (Hu et al., 2021, arXiv:2106.09685). With a quantized base, this is QLoRA (Dettmers et
    al., 2023, arXiv:2305.14314). Tensors that the pretrained weights do not have, such as a new head, are also trained.

    Args:
        rank: Rank of the product B A.
        alpha: Scale of the product B A, before it is divided by `rank`.
        dropout: Dropout probability of the inputs of A.
        modules: Patterns of the names of the adapted layers, such as `*mlp*`. Default: all linear layers of the blocks.
        base: Precision of the frozen matrices of the blocks. `full`: not quantized. `int8`: quantized to 8 bits by
            bitsandbytes. `nf4`, `fp4`: quantized to 4 bits, with quantized scales.
    """

    training_options: ClassVar[tuple[str, ...]] = ("dropout",)

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    modules: Sequence[str] = ()
    base: Literal["full", "int8", "nf4", "fp4"] = "full"

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise UserError(
                f"model.adapter has rank {self.rank}, alpha {self.alpha:g} and dropout {self.dropout:g}, but must have "
                "a rank of 1 or more, an alpha above 0 and a dropout from 0 to below 1"
            )

    @property
    def quantized(self) -> bool:  # type: ignore[override]
        """Whether the base is quantized by bitsandbytes."""
        return self.base != "full"

    def check(self, strategy: Strategy) -> None:
        if capabilities(strategy).splits_matrices:
            raise UserError("tensor parallelism cannot split the matrices of LoRA: use --trainer.strategy ddp")
        if self.quantized and not capabilities(strategy).quantized_weights:
            raise UserError(
                f"model.adapter.base {self.base} does not work with {type(strategy).__name__}, which does not support "
                "the data types of bitsandbytes: use --trainer.strategy ddp, or model.adapter.base full"
            )

    def loading_options(
        self, skeleton: transformers.PreTrainedModel, device: torch.device, precision: str = "32-true"
    ) -> dict[str, Any]:
        if not self.quantized:
            return {}
        # bitsandbytes would not use int8 for columns with large inputs, which it selects for a batch at once, so that
        # a token would depend on later tokens, and a text on the other texts of the batch.
        settings: dict[str, Any] = {"llm_int8_threshold": 0.0}
        if self.base != "int8":
            settings = {"bnb_4bit_compute_dtype": COMPUTE.get(precision.split("-")[0], torch.float32)}
        config = bitsandbytes_config(
            self.base, skeleton, linear_layers(skeleton), "the adapter LoRA", "lora", **settings
        )
        return {"quantization_config": config, "device_map": {"": str(device)}}

    def adapt(self, network: transformers.PreTrainedModel, new: Collection[str]) -> frozenset[str]:
        peft = package("peft")
        layers = linear_layers(network, self.modules)
        if self.quantized:
            remedy = "use model.adapter.base full"
            refuse_other_classes(network, linear_layers(network), bitsandbytes_layers(), "model.adapter", remedy)
            compat.keep_trainable(network)
        peft.inject_adapter_in_model(self.peft_config(layers), network)
        remedy = "choose others with model.adapter.modules"
        refuse_other_classes(network, layers, peft.tuners.lora.LoraLayer, "model.adapter", remedy)
        for name, parameter in network.named_parameters():
            if name in new:
                parameter.requires_grad_(True)
        return frozenset(n for n, p in network.named_parameters(remove_duplicate=False) if p.requires_grad)

    def peft_config(self, layers: dict[str, nn.Linear], **more: Any) -> Any:
        """These settings as a config of peft, for the adapted layers by their names."""
        return package("peft").LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(layers),
            fan_in_fan_out=any(map(transposed, layers.values())),
            **more,
        )

    @contextmanager
    def disabled(self, network: transformers.PreTrainedModel) -> Iterator[None]:
        kind = package("peft").tuners.lora.LoraLayer
        layers = [module for module in network.modules() if isinstance(module, kind)]
        compat.set_disabled(layers, True)
        try:
            yield
        finally:
            compat.set_disabled(layers, False)

    @torch.no_grad()
    def merge(self, adapted: Adapted) -> dict[str, Tensor]:
        network, weights = adapted.network, dict(adapted.weights)
        layers = adapted_layers(network)
        inner = {id(layer) for layer in layers.values()}
        quantized = {n: m for n, m in network.named_modules() if compat.original_class(m) and id(m) not in inner}
        for name, layer in (layers | quantized).items():
            own = {key: weights.pop(key) for key in list(weights) if key.startswith(f"{name}.")}
            prefix = compat.BASE_LAYER.format(name) if name in layers else name
            if compat.original_class(layer):
                rows = compat.dequantized(layer)
            else:
                rows = own[f"{prefix}.weight"].T if transposed(layer) else own[f"{prefix}.weight"]
            if name in layers:
                a, b = compat.matrices(name, own)
                rows = rows + self.alpha / self.rank * (b @ a)
            weights[f"{name}.weight"] = rows.T.contiguous() if transposed(layer) else rows
            if f"{prefix}.bias" in own:
                weights[f"{name}.bias"] = own[f"{prefix}.bias"]
        return weights

    def save(self, adapted: Adapted, folder: Path) -> None:
        description, record, weights = adapted.description, adapted.record, adapted.weights
        network_class = untrusted.network_class(description["class"])
        with torch.device("meta"):
            skeleton = network_class(network_class.config_class.from_dict(description["config"]))
        known = skeleton.state_dict().keys()
        modules: list[str] = []  # without modules inside of others
        for module in sorted({name.rpartition(".")[0] for name in record["new"] if name in known}):
            modules += [] if f"{module}.".startswith(tuple(f"{outer}." for outer in modules)) else [module]
        settings = self.peft_config(
            adapted_layers(adapted.network),
            modules_to_save=modules or None,
            base_model_name_or_path=record["pretrained"],
        )
        settings.inference_mode = True  # as in peft's own files
        settings.save_pretrained(folder)
        outer = tuple(f"{module}." for module in modules)
        tensors = {  # (each name of tied tensors gets its own tensor)
            compat.name_in_files(name): tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in weights.items()
            if compat.is_matrix(name) or name.startswith(outer)
        }
        safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        head = {name.partition(".")[2]: weights[name] for name in record["new"] if name not in known}
        if head:  # a head of this project, which peft does not support
            safetensors.torch.save_file(head, folder / HEAD_FILE)
        (folder / "README.md").write_text(model_card(self, record["pretrained"], skeleton), encoding="utf-8")

    def summary(self, network: transformers.PreTrainedModel) -> str:
        return f"lora: rank {self.rank} in {len(adapted_layers(network))} layers (base: {self.base})"


def transposed(layer: nn.Module) -> bool:
    """Whether the matrix of a layer is (inputs, outputs), as in GPT-2, or was before it was quantized."""
    return isinstance(layer, Conv1D) or compat.original_class(layer) is Conv1D


def adapted_layers(network: transformers.PreTrainedModel) -> dict[str, Any]:
    """The layers of the base that have LoRA matrices, by their names."""
    kind = package("peft").tuners.lora.LoraLayer
    return {name: m.get_base_layer() for name, m in network.named_modules() if isinstance(m, kind)}


def model_card(lora: LoRA, pretrained: str, skeleton: transformers.PreTrainedModel) -> str:
    """The README.md of an adapter: its base model, and the code that loads both.

    Args:
        lora: The adapter.
        pretrained: Folder or Hub name of its base.
        skeleton: A network of the same class and sizes on the meta device.
    """
    name = type(skeleton).__name__
    options, imports, hint = ["dtype=torch.float32"], [name], ""
    if name.endswith("Classification"):
        options.append(f"num_labels={skeleton.config.num_labels}")
    if lora.quantized:
        settings = lora.loading_options(skeleton, torch.device("cpu"))["quantization_config"].to_diff_dict()
        settings = {
            key: value for key, value in settings.items() if key not in ("quant_method", "bnb_4bit_compute_dtype")
        }
        arguments = ", ".join(f"{key}={value!r}" for key, value in settings.items() if value is not None)
        options.append(f"quantization_config=BitsAndBytesConfig({arguments})")
        imports.append("BitsAndBytesConfig")
        hint = (
            f"\nThe base was quantized by bitsandbytes ({lora.base}) in training. Load the adapter with a base that is "
            "quantized in the same way, as shown here. With an unquantized base, or another quantization, its outputs "
            "differ from those in training.\n"
        )
    base = json.dumps(pretrained)
    arguments = ",\n    ".join([base, *options])
    return f"""---
library_name: peft
base_model: {base}
---

LoRA adapters (rank {lora.rank}, alpha {lora.alpha:g}) of a {name}, for the base {base}.
{hint}
```python
import torch
from peft import PeftModel
from transformers import {", ".join(imports)}

base = {name}.from_pretrained(
    {arguments},
)
model = PeftModel.from_pretrained(base, "THIS_FOLDER")
```
"""
