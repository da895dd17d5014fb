"""Compression of finished models: a `from_pretrained` folder in, one of a smaller or faster model out."""

import inspect
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
import transformers
from torch import Tensor, nn

from lm_lightning.data import tokenizer as tokenizers
from lm_lightning.errors import UserError
from lm_lightning.models.network import HEAD_FILE, blocks, by_rows, linear_layers, smallest

ONNX = "model.onnx"  # in a folder that is not for `transformers`


@dataclass(frozen=True)
class Step:
    """A way to compress.

    Args:
        run: Makes of a `from_pretrained` folder another one, with the value behind the step's name.
        value: Its default; None if the step takes none.
        last: Whether no step can follow, since what it leaves are no plain weights.
    """

    run: Callable[[Path, Path, float], None]
    value: Optional[float] = None
    last: bool = False


def steps_of(recipe: str) -> list[tuple[Step, float]]:
    """The steps of a recipe such as `width=0.5+int8`, with their values.

    Raises:
        UserError: If it names none, or one that cannot be where it is.
    """
    found: list[tuple[Step, float]] = []
    for part in recipe.split("+"):
        name, has_value, text = part.partition("=")
        if name not in STEPS:
            raise UserError(
                f"there is no recipe {name!r}; the recipes are {', '.join(STEPS)}, and several with + between"
            )
        if found and found[-1][0].last:
            raise UserError(f"the recipe {recipe} has {name} after a step that leaves no plain weights: put it first")
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
    """Makes a compressed model, with the tokenizer and what else is beside the weights.

    Args:
        source: `from_pretrained` folder.
        recipe: See `steps_of`.
        target: Folder to write, which is whole or not there; what was there is replaced.

    Raises:
        UserError: If the recipe does not fit the network, or needs a package that is missing.
    """
    if "quantization_config" in transformers.AutoConfig.from_pretrained(source, local_files_only=True).to_dict():
        raise UserError(f"{source} is quantized already: take the model that it was made of")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.") as scratch:  # beside, for a rename
        for number, (step, value) in enumerate(steps_of(recipe)):
            made = Path(scratch) / str(number)
            made.mkdir()
            copy_beside(source, made)
            step.run(source, made, value)
            source = made
        shutil.rmtree(target, ignore_errors=True)
        source.rename(target)


def copy_beside(source: Path, target: Path) -> None:
    """Copies what a `from_pretrained` folder has beside the network's weights: tokenizer, a head of ours, poolings."""
    for file in source.iterdir():
        weights = file.suffix in (".safetensors", ".onnx") or file.name.endswith(".index.json")
        if file.is_file() and (file.name == HEAD_FILE or not weights):
            shutil.copy(file, target)
    modules = source / "modules.json"  # of sentence-transformers
    for module in json.loads(modules.read_text(encoding="utf-8")) if modules.is_file() else []:
        if module["path"] and (source / module["path"]).is_dir():
            shutil.copytree(source / module["path"], target / module["path"])


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


def tensors_of(output: Any) -> dict[str, Tensor]:
    """The outputs of a network that are tensors, by their names."""
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}


def onnx(source: Path, target: Path, value: float) -> None:
    """Writes `model.onnx`: what the tokenizer gives in, (batch, tokens) int64 each; all outputs of the network out."""
    package("onnxscript")
    package("onnxruntime")
    network = load(source)
    network.config.use_cache = False
    taken = inspect.signature(network.forward).parameters
    names = [name for name in tokenizers.load(str(source)).model_input_names if name in taken]
    draw = torch.Generator().manual_seed(0)
    limits = {"input_ids": network.config.vocab_size, "token_type_ids": getattr(network.config, "type_vocab_size", 1)}
    inputs = {name: torch.randint(limits.get(name, 2), (2, 16), generator=draw) for name in names}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])  # a row of padding alone would have no output
    with torch.no_grad():
        right = tensors_of(network(**inputs))

    class Outputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            return tuple(tensors_of(self.network(**dict(zip(inputs, tensors)))).values())

    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    torch.onnx.export(
        Outputs(),
        tuple(inputs.values()),
        target / ONNX,
        input_names=list(inputs),
        output_names=list(right),
        dynamic_shapes=(tuple(sizes for _ in inputs),),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    told = run_onnx(session(target), {name: tensor[:1, :11] for name, tensor in inputs.items()})
    with torch.no_grad():
        right = tensors_of(network(**{name: tensor[:1, :11] for name, tensor in inputs.items()}))
    difference = max((told[name] - tensor).abs().max().item() for name, tensor in right.items())
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


def run_onnx(running: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs for some inputs, (B, T) int64 each; without a mask all tokens count, without types all are 0.

    Raises:
        UserError: If the file does not know an input.
    """
    known = [own.name for own in running.get_inputs()]
    if unknown := inputs.keys() - set(known):
        raise UserError(f"{ONNX} takes {', '.join(known)}, and this model's data has {', '.join(unknown)}, too")
    fill = {"attention_mask": torch.ones_like, "token_type_ids": torch.zeros_like}
    given = {name: inputs[name] if name in inputs else fill[name](inputs["input_ids"]) for name in known}
    found = running.run(None, {name: tensor.numpy() for name, tensor in given.items()})
    return {own.name: torch.from_numpy(value) for own, value in zip(running.get_outputs(), found)}


STEPS = {
    "int8": Step(torchao("Int8DynamicActivationInt8WeightConfig"), last=True),
    "int8-weights": Step(torchao("Int8WeightOnlyConfig"), last=True),
    "bnb-int8": Step(bitsandbytes(load_in_8bit=True), last=True),
    "nf4": Step(bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True), last=True),
    "fp4": Step(bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True), last=True),
    "sparse": Step(sparse, 0.5),
    "2:4": Step(two_of_four),
    "width": Step(narrow, 0.5),
    "layers": Step(shallow, 0.5),
    "onnx": Step(onnx, last=True),
    "onnx-int8": Step(onnx_int8, last=True),
}
