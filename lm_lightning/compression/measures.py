"""Measures the size of a model, and its speed relative to the uncompressed model."""

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
import transformers
from torch import Tensor

from lm_lightning import hub
from lm_lightning.compression import formats
from lm_lightning.compression.folder import PROGRAMS, load
from lm_lightning.compression.sparsity import count_zeros, semi_structured
from lm_lightning.linear_layers.blocks import linear_layers
from lm_lightning.networks import positions

NEW_TOKENS = 32  # number of tokens that a GPT generates for a measurement


class Measures(NamedTuple):
    """Measurements of a model; NaN if a value cannot be measured.

    Attributes:
        recipe: The recipe that made it.
        parameters: Number of parameters of the network.
        zeros: Fraction of the weights in the blocks' linear layers that are zero.
        layers: Size of the weights of the blocks' linear layers in the files, in MiB.
        disk: Size of all weights files, in MiB.
        memory: Size of all parameters and buffers, in MiB.
        latency_1: Time of a forward pass with one row, in milliseconds.
        latency_8: The same with eight rows.
        decode_1: Tokens per second that a GPT generates, with one row.
        decode_8: The same with eight rows, for all rows together.
        relative_latency_1: Ratio of `latency_1` to that of the uncompressed model. Both run alternately, so that other
            load of the machine slows down both.
        relative_latency_8: The same with eight rows.
        relative_decode_1: The same ratio for the tokens per second.
        relative_decode_8: The same with eight rows.
        loss: Loss on the run's validation split.
    """

    recipe: str
    parameters: int
    zeros: float
    layers: float
    disk: float
    memory: float
    latency_1: float
    latency_8: float
    decode_1: float
    decode_8: float
    relative_latency_1: float
    relative_latency_8: float
    relative_decode_1: float
    relative_decode_8: float
    loss: float


TIMES = Measures._fields[6:-1]


class Bench:
    """Measures models in comparison with an uncompressed one, the baseline.

    Args:
        baseline: Folder of the uncompressed model.
        tokens: Number of tokens per row of the timed passes; fewer if the network has fewer positions.
        seconds: Duration of each measurement.
        device: `cpu` or `cuda`.
    """

    def __init__(self, baseline: Path, tokens: int, seconds: float, device: str = "cpu") -> None:
        self.seconds, self.device = seconds, device
        network = self.network(baseline)
        self.limit = positions(network) or math.inf
        self.tokens = int(min(tokens, self.limit))
        if self.tokens < tokens:
            print(
                f"timed passes have {self.tokens} tokens instead of {tokens}, since the network has no more positions",
                flush=True,
            )
        self.baseline = self.calls(baseline, network)

    def network(self, folder: Path) -> transformers.PreTrainedModel:
        """Loads the network of a folder; on a GPU in bf16 and with the kernels for the pattern 2:4."""
        if self.device == "cpu":
            network = load(folder)
        else:
            quantized = "quantization_config" in hub.config(str(folder)).to_dict()
            network = load(folder, device_map=self.device, **({} if quantized else {"dtype": torch.bfloat16}))
            semi_structured(network)
        if network.can_generate():
            # `generate` would add the settings of the model's own generation config, such as a repetition penalty.
            network.generation_config = transformers.GenerationConfig()
        return network

    def calls(self, folder: Path, running: Any) -> dict[str, Callable[[], Any]]:
        """The calls to time: passes with one and with eight rows, and for a GPT also the generation of 32 tokens.

        Args:
            folder: Folder of the model.
            running: Its network, or the runner of its program.
        """
        vocabulary = hub.config(str(folder)).vocab_size
        found: dict[str, Callable[[], Any]] = {}
        network = isinstance(running, torch.nn.Module)
        for size in (1, 8):
            ids = torch.randint(vocabulary, (size, self.tokens), generator=torch.Generator().manual_seed(0))
            ids = ids.to(self.device) if network else ids
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            own = {"decoder_input_ids": ids} if network and running.config.is_encoder_decoder else {}
            found[f"latency_{size}"] = torch.no_grad()(partial(running, **inputs, **own))
            if network and running.can_generate() and self.limit >= 8 + NEW_TOKENS:
                settings = {
                    "do_sample": False,
                    "min_new_tokens": NEW_TOKENS,
                    "max_new_tokens": NEW_TOKENS,
                    "pad_token_id": 0,
                    **dict.fromkeys(["decoder_start_token_id"] if own else [], 0),
                }
                prompts = {name: tensor[:, :8] for name, tensor in inputs.items()}
                found[f"decode_{size}"] = partial(running.generate, **prompts, **settings)
        return found

    def measure(self, recipe: str, folder: Path, loss: float) -> Measures:
        """Measures the model in a folder.

        Args:
            recipe: The recipe that made it.
            folder: `from_pretrained` folder, or a folder with a program.
            loss: The loss on the validation split; NaN if unknown.
        """
        disk = sum(f.stat().st_size for f in folder.iterdir() if f.suffix in (".safetensors", *PROGRAMS)) / 2**20
        running: Any = formats.runner(folder)
        program = running is not None
        network = None if program else self.network(folder)
        times = dict.fromkeys(TIMES, math.nan)
        for name, call in self.calls(folder, running or network).items():
            own, other = self.timed(call, self.baseline[name])
            if name.startswith("decode"):  # tokens per second
                own, other = (1000 * NEW_TOKENS * int(name[-1]) / value for value in (own, other))
            times[name], times[f"relative_{name}"] = own, own / other
        if network is None:
            onnx = (folder / formats.ONNX).is_file()
            layers_size = sum(formats.quantized(folder / formats.ONNX)) / 2**20 if onnx else 0
            return Measures(recipe, 0, math.nan, layers_size or math.nan, disk, disk, *times.values(), loss=loss)  # type: ignore
        memory = sum(tensor_bytes(tensor) for tensor in [*network.parameters(), *network.buffers()]) / 2**20
        layers, share = linear_layers(network), math.nan
        if all(type(layer.weight) is torch.nn.Parameter for layer in layers.values()):  # not quantized
            zeros, weights = count_zeros(layers)
            share = zeros / weights
        in_file = size_in_files(folder, list(layers))
        return Measures(recipe, network.num_parameters(), share, in_file, disk, memory, *times.values(), loss=loss)  # type: ignore

    def timed(self, call: Callable[[], Any], other: Callable[[], Any]) -> tuple[float, float]:
        """The median times of two calls in milliseconds; they run alternately, at least three times each."""
        wait = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        times: tuple[list[float], list[float]] = ([], [])
        call(), other()
        end = time.perf_counter() + self.seconds
        while len(times[0]) < 3 or time.perf_counter() < end:
            for own, one in zip(times, (call, other)):
                wait()
                start = time.perf_counter()
                one()
                wait()
                own.append(1000 * (time.perf_counter() - start))
        return statistics.median(times[0]), statistics.median(times[1])


def size_in_files(folder: Path, layers: list[str]) -> float:
    """Size of the weights of layers in the files of a folder, including the scales of quantized layers, in MiB."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safetensors.safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is not a dict)
                if key.rpartition(".")[2] != "bias" and any(key.startswith(f"{layer}.") for layer in layers):
                    tensor = file.get_tensor(key)
                    total += tensor.numel() * tensor.element_size()
    return total / 2**20


def tensor_bytes(tensor: Tensor) -> int:
    """Size of a tensor in memory in bytes; a tensor of torchao consists of several tensors."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(tensor_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def pareto(rows: list[Measures]) -> set[str]:
    """The Pareto-optimal recipes: no other recipe is better in size, latency or loss without being worse in another."""

    def values(row: Measures) -> tuple[float, float, float]:
        return row.disk, row.relative_latency_1, -math.inf if math.isnan(row.loss) else row.loss

    def better(one: Measures, other: Measures) -> bool:
        pairs = list(zip(values(one), values(other)))
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    return {row.recipe for row in rows if not any(better(other, row) for other in rows)}
