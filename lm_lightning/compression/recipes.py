"""Recipes: names of steps with their shares in, such as `width=0.5+int8`; a folder of a compressed model out."""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Protocol

from lm_lightning import hub
from lm_lightning.compression.calibration import Calibration
from lm_lightning.compression.folder import copy_beside
from lm_lightning.compression.formats import Onnx, Program
from lm_lightning.compression.quantization import BitsAndBytes, TorchAO
from lm_lightning.compression.sparsity import Sparsity
from lm_lightning.compression.structure import Structure
from lm_lightning.errors import UserError
from lm_lightning.files import put


class Way(Protocol):
    """What a step does."""

    def check(self, network: Any, value: float, modules: Sequence[str]) -> None:
        """Refuses a network before any work is done."""

    def __call__(
        self, source: Path, target: Path, value: float, calibration: Optional[Calibration], modules: Sequence[str]
    ) -> None:
        """Makes of a `from_pretrained` folder another one.

        Args:
            source: The one.
            target: The other, which is there, with all but the weights.
            value: That behind the step's name.
            calibration: Measures what the layers of a folder's network are given, where there is data.
            modules: Patterns of the names of linear layers, for a way that goes by layers; none for all.
        """


@dataclass(frozen=True)
class Step:
    """A step of a recipe.

    Args:
        way: To compress.
        value: Its default; None if the step takes none.
        last: Whether no step can follow, since what it leaves are no plain weights.
    """

    way: Way
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
    "bnb-int8": Step(BitsAndBytes(8), last=True),
    "nf4": Step(BitsAndBytes(4, "nf4"), last=True),
    "fp4": Step(BitsAndBytes(4, "fp4"), last=True),
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


def compress(
    source: Path,
    recipe: str,
    target: Path,
    calibration: Optional[Calibration] = None,
    modules: Sequence[str] = (),
) -> None:
    """Makes a compressed model, with the tokenizer and what else is beside the weights.

    Args:
        source: `from_pretrained` folder.
        recipe: See `steps_of`.
        target: Folder to write, which is whole or not there; what was there is replaced.
        calibration: Measures what the layers of a folder's network are given.
        modules: Patterns of the names of linear layers of the blocks, for the steps that go by layers. Default: all.

    Raises:
        UserError: If the recipe does not fit the network, or needs a package or data that is missing.
    """
    if "quantization_config" in hub.config(str(source)).to_dict():
        raise UserError(f"{source} is quantized already: take the model that it was made of")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.") as scratch:  # beside, for a rename
        for number, (step, value) in enumerate(steps_of(recipe)):
            made = Path(scratch) / str(number)
            made.mkdir()
            copy_beside(source, made)
            step.way(source, made, value, calibration, modules)
            source = made
        put(source, target)
