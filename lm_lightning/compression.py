"""Compression of finished models: a `from_pretrained` folder in, one of a smaller or faster model out."""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
import transformers
from torch import Tensor, nn

from lm_lightning.errors import UserError
from lm_lightning.models.network import blocks, by_rows, linear_layers, smallest

ONNX = "model.onnx"  # in a folder that is not for `transformers`


@dataclass(frozen=True)
class Step:
    """A way to compress.

    Args:
        does: What it does, for the help.
        run: Makes of a folder another one, both `from_pretrained`, with the value behind the step's name.
        value: Its default; None if the step takes none.
    """

    does: str
    run: Callable[[Path, Path, float], None]
    value: Optional[float] = None


def steps_of(recipe: str) -> list[tuple[Step, float]]:
    """The steps of a recipe such as `width=0.5+int8`, with their values.

    Raises:
        UserError: If it names none.
    """
    found = []
    for part in recipe.split("+"):
        name, has_value, text = part.partition("=")
        if name not in STEPS:
            raise UserError(
                f"there is no recipe {name!r}; the recipes are {', '.join(STEPS)}, and several with + between"
            )
        step, value = STEPS[name], STEPS[name].value or 0.0
        if has_value:
            try:
                value = float(text)
            except ValueError:
                value = math.nan
            if step.value is None or not 0 < value < 1:
                raise UserError(
                    f"the recipe {part} has {text!r}, but takes "
                    + ("no value" if step.value is None else f"a share between 0 and 1, such as {name}={step.value:g}")
                )
        found.append((step, value))
    return found


def compress(source: Path, recipe: str, target: Path) -> None:
    """Makes a compressed model, with the tokenizer and whatever else is in its folder.

    Args:
        source: `from_pretrained` folder.
        recipe: See `steps_of`.
        target: Folder to write; is made.

    Raises:
        UserError: If the recipe does not fit the network, or needs a package that is missing.
    """
    if "quantization_config" in transformers.AutoConfig.from_pretrained(source, local_files_only=True).to_dict():
        raise UserError(f"{source} is quantized already: take the model that it was made of")
    steps = steps_of(recipe)
    for number, (step, value) in enumerate(steps, start=1):
        folder = target if number == len(steps) else target.with_name(f"{target.name}.{number}")
        folder.mkdir(parents=True)
        for file in source.iterdir():  # the tokenizer and the like; no weights, whose files may have other names
            if file.suffix not in (".safetensors", ".onnx") and file.name != "model.safetensors.index.json":
                shutil.copy(file, folder)
        try:
            step.run(source, folder, value)
        finally:
            if number > 1:
                shutil.rmtree(source)
        source = folder


def load(folder: Path, **settings: Any) -> transformers.PreTrainedModel:
    """The network of a folder, of the class that it was saved from, in evaluation mode."""
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    name = (config.architectures or ["none"])[0]
    if not hasattr(transformers, name):
        raise UserError(f"{folder}/config.json tells no class of transformers: it has architectures {name}")
    return getattr(transformers, name).from_pretrained(folder, local_files_only=True, **settings).eval()


def package(name: str) -> Any:
    """A package that is not always needed."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f'this recipe needs the package {name}: pip install -e ".[compress]"') from error


# Quantization


def quantize(
    source: Path, target: Path, config: Callable[[list[str]], Any], kinds: Callable[[nn.Module], bool]
) -> None:
    """Quantizes the linear layers of the blocks.

    Args:
        source: `from_pretrained` folder.
        target: Is there.
        config: Makes the quantization config of `transformers` from the names of the layers that are to stay.
        kinds: Whether a layer is quantized.

    Raises:
        UserError: If a layer was left out, which would else go unnoticed.
    """
    network = load(source)
    layers = linear_layers(network)
    stay = [name for name, module in network.named_modules() if isinstance(module, nn.Linear) and name not in layers]
    network = load(source, quantization_config=config(stay), dtype=torch.float32)
    modules = dict(network.named_modules())
    left = [name for name in layers if not kinds(modules[name])]
    if left:
        raise UserError(
            f"this recipe leaves {len(left)} of {len(layers)} linear layers of {type(network).__name__} as they are, "
            f"such as {left[0]} ({type(modules[left[0]]).__name__}): take another one ("
            "bnb-int8 and nf4 know GPT-2's Conv1D)"
        )
    network.save_pretrained(target)


def torchao(name: str) -> Callable[[Path, Path, float], None]:
    """A step that quantizes by a config of torchao."""

    def run(source: Path, target: Path, value: float) -> None:
        package("torchao")
        quantization = package("torchao.quantization")
        base = package("torchao.utils").TorchAOBaseTensor
        config = getattr(quantization, name)()
        quantize(
            source,
            target,
            lambda stay: transformers.TorchAoConfig(config, modules_to_not_convert=stay),
            lambda layer: isinstance(layer.weight, base),
        )

    return run


def bitsandbytes(**settings: Any) -> Callable[[Path, Path, float], None]:
    """A step that quantizes by bitsandbytes."""

    def run(source: Path, target: Path, value: float) -> None:
        package("accelerate")  # with which transformers loads
        modules = package("bitsandbytes").nn
        quantize(
            source,
            target,
            lambda stay: transformers.BitsAndBytesConfig(llm_int8_skip_modules=stay, **settings),
            lambda layer: isinstance(layer, (modules.Linear4bit, modules.Linear8bitLt)),
        )

    return run


# Sparsity


@torch.no_grad()
def sparse(source: Path, target: Path, share: float) -> None:
    """Makes the smallest weights of each layer of the blocks zero."""
    network = load(source)
    for layer in linear_layers(network).values():
        scores = layer.weight.abs().flatten()
        layer.weight.masked_fill_(smallest(scores, share).view_as(layer.weight), 0)
    network.save_pretrained(target)


@torch.no_grad()
def two_of_four(source: Path, target: Path, value: float) -> None:
    """Makes the smaller two of four inputs in a row zero."""
    network = load(source)
    for name, layer in linear_layers(network).items():
        rows = by_rows(layer, layer.weight)
        if rows.shape[1] % 4:
            raise UserError(f"{name} has {rows.shape[1]} inputs, no multiple of 4, which the recipe 2:4 needs")
        rows.masked_fill_(smallest(rows.abs().unflatten(1, (-1, 4)), 0.5).flatten(1), 0)
    network.save_pretrained(target)


# Structure


def width_of(config: transformers.PreTrainedConfig) -> tuple[str, int]:
    """The setting of a network's feed-forward width, and its value."""
    for key in ("n_inner", "intermediate_size", "ffn_dim", "hidden_dim"):
        if hasattr(config, key):
            return key, getattr(config, key) or 4 * config.hidden_size
    raise UserError(f"networks of type {config.model_type} have no feed-forward width that is known here")


@torch.no_grad()
def narrow(source: Path, target: Path, share: float) -> None:
    """Keeps a share of the units between the feed-forward layers, those with the largest weights in and out."""
    network = load(source)
    key, width = width_of(network.config)
    kept = max(8, round(share * width / 8) * 8)
    weights, names = network.state_dict(), {id(m): name for name, m in network.named_modules()}
    linear = linear_layers(network)
    for block in blocks(network):
        layers = [layer for name, layer in linear.items() if name.startswith(f"{names[id(block)]}.")]
        up = [layer for layer in layers if by_rows(layer, layer.weight).shape[0] == width]
        down = [layer for layer in layers if by_rows(layer, layer.weight).shape[1] == width]
        if not up or len(down) != 1 or width == network.config.hidden_size:
            raise UserError(f"the feed-forward layers of {type(network).__name__} are not known here: leave width out")
        importance = by_rows(down[0], down[0].weight).norm(dim=0)
        for layer in up:
            importance = importance * by_rows(layer, layer.weight).norm(dim=1)
        units = importance.topk(kept).indices.sort().values
        for layer in up + down:
            name, rows = names[id(layer)], by_rows(layer, layer.weight)
            sliced = rows[units] if layer in up else rows[:, units]
            weights[f"{name}.weight"] = by_rows(layer, sliced).contiguous()
            if layer in up and layer.bias is not None:
                weights[f"{name}.bias"] = layer.bias[units]
    save_as(network, {key: kept}, weights, target)


@torch.no_grad()
def shallow(source: Path, target: Path, share: float) -> None:
    """Keeps a share of the blocks, at even distances, the first and the last among them (Sajjad et al., 2023)."""
    network = load(source)
    all_blocks = blocks(network)
    names = {id(module): name for name, module in network.named_modules()}
    prefix = names[id(all_blocks[0])].rpartition(".")[0]
    if [names[id(block)] for block in all_blocks] != [f"{prefix}.{number}" for number in range(len(all_blocks))]:
        raise UserError(f"the blocks of {type(network).__name__} are no single list: leave layers out")
    number = max(1, round(share * len(all_blocks)))
    kept = torch.linspace(0, len(all_blocks) - 1, number).round().int().tolist()
    weights: dict[str, Tensor] = {}
    for key, weight in network.state_dict().items():
        if key.startswith(f"{prefix}."):
            block, _, rest = key.removeprefix(f"{prefix}.").partition(".")
            if int(block) not in kept:
                continue
            key = f"{prefix}.{kept.index(int(block))}.{rest}"
        weights[key] = weight
    changes: dict[str, Any] = {"num_hidden_layers": number}
    if getattr(network.config, "layer_types", None):
        changes["layer_types"] = [network.config.layer_types[block] for block in kept]
    save_as(network, changes, weights, target)


def save_as(network: transformers.PreTrainedModel, changes: dict[str, Any], weights: dict, target: Path) -> None:
    """Writes a network of other sizes."""
    config = type(network.config).from_dict(network.config.to_dict() | changes)
    smaller = type(network)(config)
    smaller.load_state_dict(weights)
    if network.can_generate():
        smaller.generation_config = network.generation_config
    smaller.save_pretrained(target)


# ONNX


def onnx(source: Path, target: Path, value: float) -> None:
    """Writes `model.onnx`: tokens and mask in, (batch, tokens) int64 each; logits or states out, float32."""
    package("onnxscript")
    package("onnxruntime")
    network = load(source)
    network.config.use_cache = False

    class Outputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.network(input_ids=input_ids, attention_mask=attention_mask)[0]

    tokens = torch.arange(5, 37).view(2, 16) % network.config.vocab_size
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    torch.onnx.export(
        Outputs(),
        (tokens, torch.ones_like(tokens)),
        target / ONNX,
        input_names=["input_ids", "attention_mask"],
        output_names=["output"],
        dynamic_shapes=(sizes, sizes),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    with torch.no_grad():
        right = network(tokens[:1, :11], attention_mask=torch.ones_like(tokens[:1, :11]))[0]
    difference = (run_onnx(session(target), tokens[:1, :11]) - right).abs().max().item()
    if not difference < 1e-3:
        raise UserError(f"the outputs of {ONNX} differ from the network's by {difference:.2g}: it is of no use")


def onnx_int8(source: Path, target: Path, value: float) -> None:
    """Writes `model.onnx` with weights of int8, whose inputs are quantized as they come."""
    onnx(source, target, value)
    quantization = package("onnxruntime.quantization")
    whole = (target / ONNX).rename(target / "whole.onnx")
    quantization.quantize_dynamic(
        whole,
        target / ONNX,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul", "Gemm"],
    )
    whole.unlink()


def session(folder: Path) -> Any:
    """What runs the `model.onnx` of a folder, with as many threads as torch has."""
    runtime = package("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return runtime.InferenceSession(str(folder / ONNX), options, providers=["CPUExecutionProvider"])


def run_onnx(running: Any, tokens: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """The outputs for tokens, (B, T) int64, and a mask of the same shape, or none."""
    mask = torch.ones_like(tokens) if mask is None else mask
    return torch.from_numpy(running.run(None, {"input_ids": tokens.numpy(), "attention_mask": mask.numpy()})[0])


STEPS = {
    "int8": Step("int8 weights and inputs, by torchao", torchao("Int8DynamicActivationInt8WeightConfig")),
    "int8-weights": Step("int8 weights, by torchao", torchao("Int8WeightOnlyConfig")),
    "bnb-int8": Step("int8 weights and inputs, by bitsandbytes", bitsandbytes(load_in_8bit=True)),
    "nf4": Step(
        "4-bit normal floats, by bitsandbytes",
        bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    ),
    "fp4": Step(
        "4-bit floats, by bitsandbytes",
        bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True),
    ),
    "sparse": Step("zeros in the place of the smallest weights", sparse, 0.5),
    "2:4": Step("zeros in the place of two of four inputs", two_of_four),
    "width": Step("a share of the feed-forward width", narrow, 0.5),
    "layers": Step("a share of the blocks", shallow, 0.5),
    "onnx": Step("ONNX, for onnxruntime", onnx),
    "onnx-int8": Step("ONNX with int8 weights and inputs", onnx_int8),
}
