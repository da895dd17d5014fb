"""The texts of other libraries that `lm_lightning.compat` reads are as we assume."""

import argparse
from pathlib import Path
from typing import Literal, Optional

import jsonargparse
import pytest
import torch
import transformers

from lm_lightning.compat import jsonargparse_messages as messages
from lm_lightning.compat import torch as of_torch
from lm_lightning.compat import transformers as of_transformers


class Base:
    """The base of a class with options."""

    def __init__(self, size: int = 1, mode: Literal["a", "b"] = "a", other: "Optional[Base]" = None) -> None:
        if size < 0:
            raise ValueError("size is negative")


def parser() -> jsonargparse.ArgumentParser:
    made = jsonargparse.ArgumentParser(exit_on_error=False)
    made.add_argument("--config", action="config")
    made.add_subclass_arguments(Base, "base", required=True)
    made.add_class_arguments(Base, "own")
    made.add_argument("--number", type=int)
    return made


def refused(*arguments: str) -> str:
    with pytest.raises(argparse.ArgumentError) as error:
        parser().parse_args(list(arguments))
    return str(error.value)


BASE = f"--base={__name__}.Base"


def test_unknown_options_are_named():
    assert messages.UNKNOWN.search(refused(BASE, "--strange", "1"))[3] == "--strange 1"
    text = refused(BASE, "--base.strange", "1")
    found = messages.UNKNOWN.search(text)
    assert (found[1] or found[2]) == "strange"
    assert messages.KEY.findall(text[: found.start()])[0] == "base"
    assert f"{__name__}.Base" in [
        *messages.CHOSEN.findall(text[: found.start()]),
        *messages.WITH_CLASS.findall(text[found.end() :]),
    ]


def test_unknown_options_of_a_group_are_named(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("own: {strange: 1}")
    text = refused(BASE, "--config", str(tmp_path / "a.yaml"))
    assert messages.UNKNOWN.search(text)[2] == "strange"
    assert messages.GROUP.search(text)[1] == "own"


def test_values_of_another_type_are_described():
    text = refused(BASE, "--number", "many")
    found = messages.EXPECTED.search(text)
    assert (messages.KEY.findall(text)[0], messages.SUBTYPES.findall(found["type"])[0][0]) == ("number", "int")
    assert "many" in (found["value"] or messages.GIVEN.findall(text)[0])
    text = refused(BASE, "--own.mode", "c")
    types = messages.TYPES.search(text)[1] if messages.TYPES.search(text) else messages.EXPECTED.search(text)["type"]
    assert messages.SUBTYPES.findall(types)[0][1] == "'a', 'b'"


@pytest.mark.parametrize("name", ["Strange", "strange.Strange", f"{__name__}.Strange", "builtins.int"])
def test_classes_that_do_not_fit_are_named(name: str):
    found = messages.CLASS.search(refused(f"--base={name}")).groupdict()
    given = [found[key] for key in ("name", "path", "value", "kind", "other") if found[key]]
    assert given in ([name], [name.rpartition(".")[2]], [f"{__name__}.Base"]) or not given


def test_other_texts_of_the_parser():
    assert messages.REQUIRED.search(refused())[1] == "base"
    assert messages.ARGUMENT.findall(refused(BASE, "--number"))[0] == "--number"
    assert messages.CONFIG.search(refused(BASE, "--own", "[1]"))


def test_the_errors_of_classes_stand_among_the_types_of_an_option():
    made = jsonargparse.ArgumentParser(exit_on_error=False)
    made.add_argument("--base", type=Optional[Base])
    parsed = made.parse_args([f"--base={__name__}.Base", "--base.size=-1"])
    with pytest.raises(ValueError) as error:
        made.instantiate(parsed) if hasattr(made, "instantiate") else made.instantiate_classes(parsed)
    text = str(error.value)
    assert any("size is negative" in line for line in messages.tried_types(text) or [text])


def test_fused_optimizers_skip_a_step():
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    of_torch.skip_step_if(optimizer, torch.tensor(True))
    optimizer.step()
    assert parameter.tolist() == [1, 1]
    of_torch.skip_step_if(optimizer, torch.tensor(False))
    optimizer.step()
    assert parameter.tolist() != [1, 1]


def test_code_that_a_model_folder_needs_is_recognized(tmp_path: Path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}, "architectures": ["Own"]}'
    )
    (tmp_path / "own.py").write_text("raise SystemExit")
    with pytest.raises(ValueError) as error:
        transformers.AutoConfig.from_pretrained(tmp_path, trust_remote_code=False)
    assert of_transformers.needs_remote_code(error.value)
    assert not of_transformers.needs_remote_code(ValueError("something else"))
