"""LoRA: a pretrained network in, the same one out, frozen, with small matrices beside its own that alone are trained.

A checkpoint holds these matrices and what is new, the base comes from where it came from; an export is either the sum
of both, a network like any other, or a folder of peft's.
"""

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Optional

import safetensors.torch
import torch
import transformers
from huggingface_hub import snapshot_download
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lm_lightning import errors, hub
from lm_lightning.errors import UserError
from lm_lightning.files import checksum
from lm_lightning.models.export import HEAD_FILE
from lm_lightning.networks import linear_layers
from lm_lightning.security import untrusted
from lm_lightning.strategies.sharded import FSDP2, TensorParallel
from lm_lightning.xla.strategy import XLA

package = partial(errors.package, what="model.lora", extra="lora")
COMPUTE = {"bf16": torch.bfloat16, "16": torch.float16}  # the trainer's precision -> that of a quantized base


@dataclass
class LoRA:
    """Trains matrices of low rank beside those of a pretrained network, which stays as it is.

    To what the matrix W of a layer gives, (outputs, inputs), is added alpha / rank * B A, of (outputs, rank) and (rank,
    inputs), where B is zero at first (Hu et al., 2021, arXiv:2106.09685). With a quantized base that is QLoRA (Dettmers
    et al., 2023, arXiv:2305.14314). What the pretrained weights do not have, such as a new head, is trained as well.

    Args:
        rank: Of the product B A.
        alpha: How much it counts, as a multiple of `rank`.
        dropout: Share of the inputs of A that is left out in training.
        modules: Patterns of the names of the adapted layers, such as `*mlp*`. Default: all linear layers of the blocks.
        base: How the frozen matrices of the blocks are held: as they are, or by bitsandbytes in 8 bits, `int8`, or in
            4, `nf4` and `fp4`, whose scales are quantized as well.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    modules: Sequence[str] = ()
    base: Literal["whole", "int8", "nf4", "fp4"] = "whole"

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise UserError(
                f"model.lora has rank {self.rank}, alpha {self.alpha:g} and dropout {self.dropout:g}, but must have a "
                "rank of 1 or more, an alpha above 0 and a dropout from 0 to below 1"
            )

    def check(self, strategy: Strategy) -> None:
        """Refuses strategies that cannot hold the base, before it is loaded."""
        if isinstance(strategy, TensorParallel):
            raise UserError("tensor parallelism does not know how to split model.lora: take --trainer.strategy ddp")
        if self.base != "whole" and isinstance(strategy, (FSDP2, XLA)):
            why = "splits its matrices" if isinstance(strategy, FSDP2) else "bitsandbytes does not know"
            raise UserError(
                f"model.lora.base {self.base} does not work with {type(strategy).__name__}, which {why}: take "
                "--trainer.strategy ddp, or model.lora.base whole"
            )

    def quantization(
        self, skeleton: transformers.PreTrainedModel, device: torch.device, precision: str = "32-true"
    ) -> dict[str, Any]:
        """What `from_pretrained` has to be told, so that it holds the blocks' matrices as `base` says.

        Args:
            skeleton: A network of the same sizes, whose weights are not needed.
            device: Where the quantized matrices are to be.
            precision: The trainer's.
        """
        if self.base == "whole":
            return {}
        package("accelerate")  # with which transformers loads
        package("bitsandbytes")
        layers = linear_layers(skeleton)
        stay = [name for name, m in skeleton.named_modules() if isinstance(m, nn.Linear) and name not in layers]
        four = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.base,
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": COMPUTE.get(precision.split("-")[0], torch.float32),
        }
        # bitsandbytes would take columns with large inputs out of int8, those of a batch as a whole, so that a token
        # would depend on those after it, and a text on its neighbours.
        eight = {"load_in_8bit": True, "llm_int8_threshold": 0.0}
        settings: dict[str, Any] = eight if self.base == "int8" else four
        config = transformers.BitsAndBytesConfig(llm_int8_skip_modules=stay, **settings)
        return {"quantization_config": config, "device_map": {"": str(device)}}

    def adapt(self, network: transformers.PreTrainedModel, new: Collection[str]) -> frozenset[str]:
        """Adds the adapters to a network, in place, and freezes all but them and what is new.

        Args:
            network: Loaded with `quantization`.
            new: Names of the tensors that the pretrained weights do not have.

        Returns:
            The names of the tensors that are not those of the base, which a checkpoint has to hold.

        Raises:
            UserError: If a layer was not quantized or not adapted, which would else go unnoticed.
        """
        peft = package("peft")
        layers = linear_layers(network, self.modules)
        if self.base != "whole":
            kinds = package("bitsandbytes").nn
            refuse_left(
                network, linear_layers(network), (kinds.Linear4bit, kinds.Linear8bitLt), "model.lora.base whole"
            )
            for module in network.modules():
                # On CPUs with bf16 it would pack the weights anew in an evaluation, and then could not train on.
                if isinstance(module, kinds.Linear4bit):
                    module.support_avx512bf16_for_cpu = False
        peft.inject_adapter_in_model(self.peft_config(layers), network)
        refuse_left(network, layers, peft.tuners.lora.LoraLayer, "others in model.lora.modules")
        for name, parameter in network.named_parameters():
            if name in new:
                parameter.requires_grad_(True)
        return frozenset(n for n, p in network.named_parameters(remove_duplicate=False) if p.requires_grad)

    def peft_config(self, layers: dict[str, nn.Linear], **more: Any) -> Any:
        """These settings in peft's terms, for the adapted layers by their names."""
        return package("peft").LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(layers),
            fan_in_fan_out=any(map(transposed, layers.values())),
            **more,
        )


def refuse_left(network: nn.Module, names: Collection[str], kinds: Any, remedy: str) -> None:
    """Refuses a network of which layers have not become of these kinds, but are as they were.

    Raises:
        UserError: Names the first of them, and the remedy.
    """
    modules = dict(network.named_modules())
    left = [name for name in names if not isinstance(modules[name], kinds)]
    if left:
        raise UserError(
            f"model.lora leaves {len(left)} of {len(names)} linear layers of {type(network).__name__} as they are, "
            f"such as {left[0]} ({type(modules[left[0]]).__name__}): take {remedy}"
        )


def transposed(layer: nn.Module) -> bool:
    """Whether the matrix of a layer lies the other way round, (inputs, outputs), as GPT-2's, or did, if quantized."""
    return isinstance(layer, Conv1D) or getattr(layer, "source_cls", None) is Conv1D


def adapted_layers(network: transformers.PreTrainedModel) -> dict[str, Any]:
    """The layers of the base that have adapters beside them, by their names."""
    kind = package("peft").tuners.lora.LoraLayer
    return {name: m.get_base_layer() for name, m in network.named_modules() if isinstance(m, kind)}


@torch.no_grad()
def merged(network: transformers.PreTrainedModel, weights: dict[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """The weights of a network without LoRA that gives the same, float32, by the names that its class has for them.

    Args:
        network: With adapters.
        weights: Its state dict, each tensor whole and on the CPU.
        scaling: Factor of the adapters' products.
    """
    from peft.utils.integrations import dequantize_bnb_weight

    weights, adapted = dict(weights), adapted_layers(network)
    inner = {id(layer) for layer in adapted.values()}
    # (what transformers has quantized remembers what it was)
    quantized = {n: m for n, m in network.named_modules() if hasattr(m, "source_cls") and id(m) not in inner}
    for name, layer in (adapted | quantized).items():
        own = {key: weights.pop(key) for key in list(weights) if key.startswith(f"{name}.")}
        prefix = f"{name}.base_layer" if name in adapted else name
        if hasattr(layer, "source_cls"):
            rows = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)).float().cpu()
        else:
            rows = own[f"{prefix}.weight"].T if transposed(layer) else own[f"{prefix}.weight"]
        if name in adapted:
            a, b = (own[f"{name}.lora_{matrix}.default.weight"] for matrix in "AB")
            rows = rows + scaling * (b @ a)
        weights[f"{name}.weight"] = rows.T.contiguous() if transposed(layer) else rows
        if f"{prefix}.bias" in own:
            weights[f"{name}.bias"] = own[f"{prefix}.bias"]
    return weights


def save_adapter(
    network: transformers.PreTrainedModel, weights: dict[str, Tensor], saved: dict[str, Any], folder: Path
) -> None:
    """Writes the adapters, and the modules that are new, as a folder of peft's.

    Args:
        network: With adapters.
        weights: As in `merged`.
        saved: As `described` gives it, with the `class` and `config` of the network.
        folder: Is made if it does not exist.
    """
    network_class = untrusted.network_class(saved["class"])
    with torch.device("meta"):
        skeleton = network_class(network_class.config_class.from_dict(saved["config"]))
    known = skeleton.state_dict().keys()
    modules: list[str] = []  # of those within each other, the outer one
    for module in sorted({name.rpartition(".")[0] for name in saved["new"] if name in known}):
        modules += [] if f"{module}.".startswith(tuple(f"{outer}." for outer in modules)) else [module]
    settings = settings_of(saved).peft_config(
        adapted_layers(network), modules_to_save=modules or None, base_model_name_or_path=saved["pretrained"]
    )
    settings.inference_mode = True  # as peft's own files say
    settings.save_pretrained(folder)
    whole = tuple(f"{module}." for module in modules)
    tensors = {  # (of tied ones, each name has its own)
        f"base_model.model.{name.replace('.default.', '.')}": tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in weights.items()
        if ".lora_" in name or name.startswith(whole)
    }
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    head = {name.partition(".")[2]: weights[name] for name in saved["new"] if name not in known}
    if head:  # of ours, of which peft knows nothing
        safetensors.torch.save_file(head, folder / HEAD_FILE)
    (folder / "README.md").write_text(model_card(saved, skeleton), encoding="utf-8")


def model_card(saved: dict[str, Any], skeleton: transformers.PreTrainedModel) -> str:
    """The README.md of an adapter: which base it belongs to, and the code that loads both.

    Args:
        saved: As in `save_adapter`.
        skeleton: A network of the same class and sizes, whose weights are not needed.
    """
    lora, name = settings_of(saved), type(skeleton).__name__
    options, imports, hint = ["dtype=torch.float32"], [name], ""
    if name.endswith("Classification"):
        options.append(f"num_labels={skeleton.config.num_labels}")
    if lora.base != "whole":
        settings = lora.quantization(skeleton, torch.device("cpu"))["quantization_config"].to_diff_dict()
        settings = {
            key: value for key, value in settings.items() if key not in ("quant_method", "bnb_4bit_compute_dtype")
        }
        arguments = ", ".join(f"{key}={value!r}" for key, value in settings.items() if value is not None)
        options.append(f"quantization_config=BitsAndBytesConfig({arguments})")
        imports.append("BitsAndBytesConfig")
        hint = (
            f"\nThe base was quantized by bitsandbytes ({lora.base}) in training. Load the adapter on the base "
            "quantized in the same way, as here: on the whole base, or on one quantized in another way, its outputs "
            "differ from those that were trained and measured.\n"
        )
    base = json.dumps(saved["pretrained"])
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


# Checkpoints


def described(lora: LoRA, pretrained: str, new: Collection[str]) -> dict[str, Any]:
    """What a checkpoint has to tell beside its tensors: the settings, and which base it belongs to."""
    return asdict(lora) | {
        "modules": list(lora.modules),
        "pretrained": os.path.abspath(pretrained) if os.path.isdir(pretrained) else pretrained,
        "checksums": checksums(pretrained),
        "new": sorted(new),
    }


def settings_of(saved: dict[str, Any]) -> LoRA:
    """The settings of `described`."""
    return LoRA(**{name: saved[name] for name in asdict(LoRA())})


def checksums(pretrained: str) -> dict[str, int]:
    """CRC-32 of each file of weights of a folder or a name of the Hub, which has been loaded before."""
    folder = Path(pretrained if os.path.isdir(pretrained) else snapshot_download(pretrained, local_files_only=True))
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return {file.name: checksum(file) for file in files}


def refuse_other(saved: Optional[dict[str, Any]], own: Optional[dict[str, Any]]) -> None:
    """Refuses a checkpoint whose adapters are none of this run, or belong to another base.

    Args:
        saved: As `described`; None without LoRA.
        own: That of this run.
    """
    if saved is None or own is None:
        if saved is not own:
            raise UserError(
                "the checkpoint has no LoRA: leave model.lora out"
                if saved is None
                else f"the checkpoint is of LoRA: give --model.pretrained {saved['pretrained']} and its model.lora, "
                f"such as --model.lora.rank {saved['rank']}"
            )
        return
    names = ("rank", "alpha", "modules", "base")  # (dropout decides no weight)
    different = [f"{name} {saved[name]} (here {own[name]})" for name in names if saved[name] != own[name]]
    if different:
        raise UserError(f"the checkpoint's model.lora has {', '.join(different)}: take what it was made with")
    if saved["checksums"] != own["checksums"]:
        raise UserError(
            f"the weights of {own['pretrained']} are not those that the checkpoint's adapters belong to "
            f"({saved['pretrained']}, as it was then): give these as model.pretrained"
        )


def network_of(checkpoint: dict[str, Any]) -> tuple[transformers.PreTrainedModel, dict[str, Tensor]]:
    """The network of a checkpoint, its base loaded from where it came from, and its state dict with the adapters.

    Raises:
        UserError: If the base is not there any more, or has changed.
    """
    saved, description = checkpoint["lora"], checkpoint["network"]
    lora, base = settings_of(saved), saved["pretrained"]
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
            **lora.quantization(skeleton, device),
        )
    except (OSError, ValueError) as error:
        raise UserError(f"the checkpoint's adapters need their base: {hub.explain(base, error)}") from error
    refuse_other(saved, described(lora, base, saved["new"]))
    lora.adapt(network, saved["new"])
    own = {k.removeprefix("network."): w for k, w in checkpoint["state_dict"].items() if k.startswith("network.")}
    return network, {name: tensor.cpu() for name, tensor in network.state_dict().items()} | own
