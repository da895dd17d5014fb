"""Formats of models that run without `transformers`: ONNX, and the exported programs of PyTorch.

The inputs of both are the tokenizer's outputs, (batch, tokens) int64 each, of any size; the outputs are all outputs of
the network.
"""

import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn

from lm_lightning.compression.calibration import Calibration
from lm_lightning.compression.folder import load, package
from lm_lightning.compression.quantization import Rounding
from lm_lightning.data import tokenizer as tokenizers
from lm_lightning.errors import UserError, one_line
from lm_lightning.linear_layers.blocks import linear_layers

ONNX, PROGRAM = "model.onnx", "model.pt2"
Runner = Callable[..., dict[str, Tensor]]  # inputs by name -> outputs by name


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses the warnings and messages of tracers and quantizers."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def tensors_of(output: Any) -> dict[str, Tensor]:
    """The tensors among the outputs of a network, by their names."""
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}


class Outputs(nn.Module):
    """A network with positional inputs and a tuple of outputs.

    Args:
        network: A network of `transformers`.
        names: The names of the inputs, in order.
    """

    def __init__(self, network: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors_of(self.network(**dict(zip(self.names, tensors)))).values())


class Format:
    """Converts a network to another format, and checks that the outputs are the same."""

    def check(self, network: nn.Module, value: float, modules: Sequence[str]) -> None:
        """Does nothing: whether a network can be traced is unknown until it is traced."""

    def write(self, program: Outputs, inputs: dict[str, Tensor], outputs: list[str], target: Path) -> None:
        """Writes the program.

        Args:
            program: The network.
            inputs: Example inputs, by their names.
            outputs: The names of its outputs.
            target: Existing folder.
        """
        raise NotImplementedError

    def __call__(
        self, source: Path, target: Path, value: float, calibration: Optional[Calibration], modules: Sequence[str]
    ) -> None:
        network = load(source)
        network.config.use_cache = False
        accepted = inspect.signature(network.forward).parameters
        names = [name for name in tokenizers.load(str(source)).model_input_names if name in accepted]
        draw = torch.Generator().manual_seed(0)
        limits = {
            "input_ids": network.config.vocab_size,
            "token_type_ids": getattr(network.config, "type_vocab_size", 1),
        }
        inputs = {name: torch.randint(limits.get(name, 2), (2, 16), generator=draw) for name in names}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])  # a row of padding would have no output
        with torch.no_grad():
            outputs = list(tensors_of(network(**inputs)))
        try:
            with quiet():
                self.write(Outputs(network, list(inputs)), inputs, outputs, target)
        except UserError:
            raise
        except Exception as error:  # tracing raises all types of errors for unsupported operations
            reason = one_line(error, 200)
            raise UserError(
                f"torch {torch.__version__} cannot trace {type(network).__name__} ({type(error).__name__}: {reason}): "
                "use a newer torch, or another recipe"
            ) from error
        other = {name: tensor[:1, :11] for name, tensor in inputs.items()}
        with torch.no_grad():
            expected = tensors_of(network(**other))
        outputs_of_program = runner(target)(**other)  # type: ignore[misc]
        difference = max((outputs_of_program[name] - value).abs().max().item() for name, value in expected.items())
        if not difference < 1e-3:
            raise UserError(
                f"the outputs of the program differ from those of the network by {difference:.2g}, so it was removed: "
                "use a newer torch, or another recipe"
            )
        with quiet():
            self.finish(network, target, modules)

    def finish(self, network: nn.Module, target: Path, modules: Sequence[str]) -> None:
        """Called when the outputs of the program have been checked; for subclasses that change it further."""


def sizes(inputs: dict[str, Tensor]) -> tuple:
    """The dynamic shapes of the inputs: any number of rows and tokens."""
    return (tuple({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for _ in inputs),)


class Program(Format):
    """`model.pt2`, a program of `torch.export`, for `torch.export.load` and AOTInductor."""

    def write(self, program: Outputs, inputs: dict[str, Tensor], outputs: list[str], target: Path) -> None:
        exported = torch.export.export(program.eval(), tuple(inputs.values()), dynamic_shapes=sizes(inputs))
        torch.export.save(exported, target / PROGRAM, extra_files={"names": "\n".join([",".join(inputs), *outputs])})


class Onnx(Format):
    """`model.onnx`.

    Args:
        bits: Number of bits of the layers' weights; their inputs are quantized to int8 at run time. Default: no
            quantization.
        block: Number of adjacent weights, and of adjacent inputs, that share a scale. Default: all weights of an
            output, and all inputs, which is faster, but much less accurate if some inputs are far larger than others.
    """

    def __init__(self, bits: Optional[int] = None, block: Optional[int] = None) -> None:
        self.bits, self.block = bits, block

    def write(self, program: Outputs, inputs: dict[str, Tensor], outputs: list[str], target: Path) -> None:
        package("onnxscript")
        package("onnxruntime")
        torch.onnx.export(
            program,
            tuple(inputs.values()),
            target / ONNX,
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes=sizes(inputs),
            dynamo=True,
            external_data=False,
            verbose=False,
        )

    def rounding(self) -> Optional[Rounding]:
        """The rounding of int8 without blocks: a scale for the weights of each output, and one for all inputs."""

        def round_weight(weight: Tensor) -> Tensor:
            scales = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
            zeros = torch.zeros_like(scales, dtype=torch.int32)
            return torch.fake_quantize_per_channel_affine(weight, scales, zeros, 0, -127, 127)

        def round_inputs(inputs: Tensor) -> Tensor:
            inputs = inputs.float()
            least = inputs.amin().clamp(max=0)
            scale = ((inputs.amax().clamp(min=0) - least) / 255).clamp(min=torch.finfo(torch.float32).tiny)
            zero = (-least / scale).round().int()
            return torch.fake_quantize_per_tensor_affine(inputs, scale, zero, 0, 255)

        return Rounding(round_weight, round_inputs) if self.bits and not self.block else None

    def finish(self, network: nn.Module, target: Path, modules: Sequence[str]) -> None:
        if self.bits is None:
            return
        quantization = package("onnxruntime.quantization")
        full = (target / ONNX).rename(target / "full.onnx")
        layers = list(linear_layers(network, modules))
        nodes = products(full, layers)
        if self.block is None:
            quantization.quantize_dynamic(
                full,
                target / ONNX,
                weight_type=quantization.QuantType.QInt8,
                per_channel=True,
                op_types_to_quantize=["MatMul", "Gemm"],
                nodes_to_quantize=nodes,
            )
        else:
            graph = package("onnxruntime.quantization.onnx_model").ONNXModel(package("onnx").load(full))
            graph.replace_gemm_with_matmul()
            stay = [node.name for node in graph.nodes() if node.op_type == "MatMul" and node.name not in nodes]
            by_blocks = package("onnxruntime.quantization.matmul_nbits_quantizer").MatMulNBitsQuantizer(
                graph.model,
                bits=self.bits,
                block_size=self.block,
                is_symmetric=True,
                accuracy_level=4,  # with inputs of int8
                nodes_to_exclude=stay,
            )
            by_blocks.process()
            by_blocks.model.save_model_to_file(str(target / ONNX))
        full.unlink()
        done = len(quantized(target / ONNX))
        if done != len(layers):
            raise UserError(
                f"onnxruntime quantized {done} weights, but there are {len(layers)} layers: use another recipe"
            )


def products(file: Path, layers: list[str]) -> list[str]:
    """The names of the nodes of an ONNX file that are the matrix products of layers.

    Raises:
        UserError: If a layer has no such node.
    """
    found: dict[str, str] = {}
    for node in package("onnx").load(file, load_external_data=False).graph.node:
        if node.op_type in ("MatMul", "Gemm"):
            scopes = {item.key: item.value for item in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "")
            for layer in layers:
                if f"'network.{layer}'" in scopes:  # (a Gemm was converted to a MatMul before)
                    found[layer] = node.name + ("_MatMul" if node.op_type == "Gemm" else "")
    missing = [layer for layer in layers if layer not in found]
    if missing:
        raise UserError(
            f"{ONNX} does not name {len(missing)} of {len(layers)} layers, such as {missing[0]}: use another recipe"
        )
    return list(found.values())


def quantized(file: Path) -> list[int]:
    """The size of each quantized weight in an ONNX file in bytes, including its scales."""
    graph = package("onnx").load(file).graph
    sizes = {own.name: len(own.raw_data) or own.ByteSize() for own in graph.initializer}
    by_blocks = [node for node in graph.node if node.op_type == "MatMulNBits"]
    weights = [name.removesuffix("_quantized") for name in sizes if name.endswith("_quantized")]
    return [sum(sizes.get(name, 0) for name in node.input[1:]) for node in by_blocks] + [
        sum(sizes.get(f"{name}_{part}", 0) for part in ("quantized", "scale", "zero_point")) for name in weights
    ]


def runner(folder: Path) -> Optional[Runner]:
    """A function that runs the program in a folder, with the same number of threads as torch; None if there is none.

    Its inputs are passed by name, (B, T) int64 each; the default of the mask is 1, the default of token types is 0. It
    raises UserError for inputs that the program does not have.
    """
    if (folder / ONNX).is_file():
        return onnx_runner(folder / ONNX)
    if (folder / PROGRAM).is_file():
        return program_runner(folder / PROGRAM)
    return None


def complete(inputs: dict[str, Tensor], known: Sequence[str], file: Path) -> list[Tensor]:
    """The inputs of a program in order; missing ones get their defaults."""
    if unknown := inputs.keys() - set(known):
        raise UserError(
            f"{file.name} has the inputs {', '.join(known)}, but the data of this model also has {', '.join(unknown)}: "
            "use a recipe without another format"
        )
    fill = {"attention_mask": torch.ones_like, "token_type_ids": torch.zeros_like}
    return [inputs[name] if name in inputs else fill[name](inputs["input_ids"]) for name in known]


def onnx_runner(file: Path) -> Runner:
    """See `runner`."""
    runtime = package("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    known, names = ([own.name for own in part] for part in (session.get_inputs(), session.get_outputs()))

    def run(**inputs: Tensor) -> dict[str, Tensor]:
        given = complete(inputs, known, file)
        found = session.run(None, {name: tensor.numpy() for name, tensor in zip(known, given)})
        return {name: torch.from_numpy(value) for name, value in zip(names, found)}

    return run


def program_runner(file: Path) -> Runner:
    """See `runner`."""
    extra = {"names": ""}
    program = torch.export.load(file, extra_files=extra).module()
    first, *names = extra["names"].split("\n")

    @torch.no_grad()
    def run(**inputs: Tensor) -> dict[str, Tensor]:
        return dict(zip(names, program(*complete(inputs, first.split(","), file))))

    return run
