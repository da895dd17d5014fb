"""Recipes: sequences of steps such as `width=0.5+int8`. Each step makes a new model folder from the previous one."""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Protocol

from lm_lightning import hub
from lm_lightning.compression.calibration import Calibration
from lm_lightning.compression.folder import copy_other_files
from lm_lightning.compression.formats import Onnx, Program
from lm_lightning.compression.quantization import BitsAndBytes, Rounding, TorchAO
from lm_lightning.compression.sparsity import Sparsity
from lm_lightning.compression.structure import Structure
from lm_lightning.errors import UserError
from lm_lightning.files import put


class CompressionMethod(Protocol):
    """A method of compressing a model.

    A method for which a network can be trained also has `rounding()`, see `quantization.Rounding`.
    """

    def check(self, network: Any, value: float, modules: Sequence[str]) -> None:
        """Refuses a network before any work is done."""

    def __call__(
        self, source: Path, target: Path, value: float, calibration: Optional[Calibration], modules: Sequence[str]
    ) -> None:
        """Writes the compressed model of a `from_pretrained` folder.

        Args:
            source: The folder.
            target: Existing folder with everything except the weights.
            value: The number in the step, such as 0.5 in `width=0.5`.
            calibration: Measures networks; None if there is no data.
            modules: Patterns of the names of linear layers, for methods that change layers; empty for all.
        """


@dataclass(frozen=True)
class Step:
    """A step of a recipe.

    Args:
        method: The compression method.
        value: The default of the step's number; None if the step has no number.
        last: Whether it must be the last step, since its result has no plain weights.
    """

    method: CompressionMethod
    value: Optional[float] = None
    last: bool = False


STEPS = {
    "int8": Step(TorchAO("Int8DynamicActivationInt8WeightConfig", version=2), last=True),
    "int8-weights": Step(TorchAO("Int8WeightOnlyConfig", version=2), last=True),
    "float8": Step(TorchAO("Float8DynamicActivationFloat8WeightConfig", device="cuda"), last=True),
    "float8-weights": Step(TorchAO("Float8WeightOnlyConfig"), last=True),
    "int4-weights": Step(
        TorchAO("Int4WeightOnlyConfig", device="cuda", int4_packing_format="tile_packed_to_4d"), last=True
    ),
    "bnb-int8": Step(BitsAndBytes("int8"), last=True),
    "nf4": Step(BitsAndBytes("nf4"), last=True),
    "fp4": Step(BitsAndBytes("fp4"), last=True),
    "sparse": Step(Sparsity(), 0.5),
    "wanda": Step(Sparsity(wanda=True), 0.5),
    "2:4": Step(Sparsity("2:4")),
    "wanda-2:4": Step(Sparsity("2:4", wanda=True)),
    "width": Step(Structure("width"), 0.5),
    "heads": Step(Structure("heads"), 0.5),
    "layers": Step(Structure("layers"), 0.5),
    "onnx": Step(Onnx(), last=True),
    "onnx-int8": Step(Onnx(8), last=True),
    "onnx-int8-blocks": Step(Onnx(8, block=64), last=True),
    "onnx-int4": Step(Onnx(4, block=32), last=True),
    "pt2": Step(Program(), last=True),
}


def steps_of(recipe: str) -> list[tuple[Step, float]]:
    """The steps of a recipe such as `width=0.5+int8`, with their numbers.

    Raises:
        UserError: If a step does not exist, or is not allowed at its position.
    """
    found: list[tuple[Step, float]] = []
    for part in recipe.split("+"):
        name, has_value, text = part.partition("=")
        if name not in STEPS:
            raise UserError(f"there is no recipe {name!r}: use one of {', '.join(STEPS)}, or several joined by +")
        if found and found[-1][0].last:
            raise UserError(
                f"in the recipe {recipe}, {name} follows a step whose result has no plain weights: put {name} first"
            )
        step, value = STEPS[name], STEPS[name].value or 0.0
        if has_value:
            try:
                value = float(text)
            except ValueError:
                value = math.nan
            if step.value is None or not 0 < value < 1:
                raise UserError(
                    f"the recipe {part} has the value {text!r}, but {name} "
                    + ("has none" if step.value is None else f"needs a fraction between 0 and 1: {name}={step.value:g}")
                )
        found.append((step, value))
    return found


def rounding_of(recipe: str) -> Optional[Rounding]:
    """The rounding of a recipe with a single step; None if it is unknown."""
    steps = steps_of(recipe)
    return getattr(steps[0][0].method, "rounding", lambda: None)() if len(steps) == 1 else None


def compress(
    source: Path,
    recipe: str,
    target: Path,
    calibration: Optional[Calibration] = None,
    modules: Sequence[str] = (),
) -> None:
    """Writes a compressed model with its tokenizer and all other files.

    Args:
        source: `from_pretrained` folder.
        recipe: See `steps_of`.
        target: Folder to write atomically; an existing one is replaced.
        calibration: Measures networks; None if there is no data.
        modules: Patterns of the names of linear layers of the blocks, for steps that change layers. Default: all.

    Raises:
        UserError: If the network does not support the recipe, or a required package or data is missing.
    """
    if "quantization_config" in hub.config(str(source)).to_dict():
        raise UserError(f"{source} is quantized already: use the model from which it was made")
    with tempfile.TemporaryDirectory(
        dir=target.parent, prefix=f"{target.name}."
    ) as scratch:  # beside the target, for a rename
        for number, (step, value) in enumerate(steps_of(recipe)):
            made = Path(scratch) / str(number)
            made.mkdir()
            copy_other_files(source, made)
            step.method(source, made, value, calibration, modules)
            source = made
        put(source, target)
