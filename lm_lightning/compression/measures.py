"""Measures of a model: its sizes, and its speed compared with that of the uncompressed model."""

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
from lm_lightning.compression.sparsity import semi_structured, zeros_of
from lm_lightning.linear_layers.blocks import linear_layers
from lm_lightning.networks import positions

NEW_TOKENS = 32  # that a GPT generates for a measurement


class Measures(NamedTuple):
    """What is measured of a model; NaN where that is impossible.

    Attributes:
        recipe: How it was made.
        parameters: Number of parameters of the network.
        zeros: Share of the weights in the blocks' linear layers that are zero.
        layers: MiB of the weights of the blocks' linear layers, in the files.
        disk: MiB of all its weights' files.
        memory: MiB of its parameters and buffers.
        latency_1: Milliseconds of a forward pass, one row.
        latency_8: The same with eight rows.
        decode_1: Tokens per second that a GPT generates, one row.
        decode_8: The same with eight rows, all together.
        relative_latency_1: Ratio of `latency_1` to that of the uncompressed model. Both run in turn, so that whatever
            else the machine does slows down both.
        relative_latency_8: The same with eight rows.
        relative_decode_1: The same ratio of the tokens per second.
        relative_decode_8: The same with eight rows.
        loss: On the run's validation split.
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
        tokens: Number of tokens in each row of the timed passes; fewer if the network has fewer positions.
        seconds: How long each time is measured.
        device: `cpu` or `cuda`.
    """

    def __init__(self, baseline: Path, tokens: int, seconds: float, device: str = "cpu") -> None:
        self.seconds, self.device = seconds, device
        network = self.network(baseline)
        self.limit = positions(network) or math.inf
        self.tokens = int(min(tokens, self.limit))
        if self.tokens < tokens:
            print(
                f"timed passes have {self.tokens} tokens instead of {tokens}, as many as the network has positions",
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
        """What is timed: a pass with one and with eight rows, and for a GPT also the generation of 32 tokens.

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
            found[f"latency_{size}"] = torch.no_grad()(partial(running, **inputs))
            if network and running.can_generate() and self.limit >= 8 + NEW_TOKENS:
                settings = {
                    "do_sample": False,
                    "min_new_tokens": NEW_TOKENS,
                    "max_new_tokens": NEW_TOKENS,
                    "pad_token_id": 0,
                }
                prompts = {name: tensor[:, :8] for name, tensor in inputs.items()}
                found[f"decode_{size}"] = partial(running.generate, **prompts, **settings)
        return found

    def measure(self, recipe: str, folder: Path, loss: float) -> Measures:
        """Measures a model of a folder.

        Args:
            recipe: How it was made.
            folder: `from_pretrained` folder, or one with a program.
            loss: The loss on the validation split, NaN if unknown.
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
        memory = sum(bytes_of(tensor) for tensor in [*network.parameters(), *network.buffers()]) / 2**20
        layers, share = linear_layers(network), math.nan
        if all(type(layer.weight) is torch.nn.Parameter for layer in layers.values()):  # none is quantized
            zeros, weights = zeros_of(layers)
            share = zeros / weights
        in_file = in_files(folder, list(layers))
        return Measures(recipe, network.num_parameters(), share, in_file, disk, memory, *times.values(), loss=loss)  # type: ignore

    def timed(self, call: Callable[[], Any], other: Callable[[], Any]) -> tuple[float, float]:
        """The median times of two calls in milliseconds, which are made in turn, at least three times each."""
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


def in_files(folder: Path, layers: list[str]) -> float:
    """MiB of the weights of some layers in the files of a folder, with the scales of quantized ones."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safetensors.safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is not a dict)
                if key.rpartition(".")[2] != "bias" and any(key.startswith(f"{layer}.") for layer in layers):
                    tensor = file.get_tensor(key)
                    total += tensor.numel() * tensor.element_size()
    return total / 2**20


def bytes_of(tensor: Tensor) -> int:
    """Bytes of a tensor in memory; a tensor of torchao consists of several."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(bytes_of(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def pareto(rows: list[Measures]) -> set[str]:
    """The Pareto-optimal recipes: no other has at most their size, latency and loss, and less of one of them."""

    def values(row: Measures) -> tuple[float, float, float]:
        return row.disk, row.relative_latency_1, -math.inf if math.isnan(row.loss) else row.loss

    def better(one: Measures, other: Measures) -> bool:
        pairs = list(zip(values(one), values(other)))
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    return {row.recipe for row in rows if not any(better(other, row) for other in rows)}
