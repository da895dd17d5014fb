"""The config that a run brings along: only harmless classes are imported, unless the user names others.

The payload is a module that makes a file named `harmed` when it is imported.
"""

import copy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import command, refusal

from lm_lightning.errors import UserError
from lm_lightning.security.trust import PACKAGES

PAYLOAD = """
from pathlib import Path
from lightning.pytorch import Callback
from torch.optim import AdamW

Path({harmed!r}).touch()

class Harm(Callback):
    def on_validation_start(self, trainer, module):
        print("the callback is called")

class Optimizer(AdamW):
    pass

def function(*_, **__) -> AdamW:
    pass
"""


def of_callbacks(value: Any) -> Callable[[dict], None]:
    return lambda config: config["trainer"].update(callbacks=value)


def of_trainer(name: str, value: Any) -> Callable[[dict], None]:
    return lambda config: config["trainer"].update({name: value})


def of_model(name: str, value: Any) -> Callable[[dict], None]:
    return lambda config: config["model"]["init_args"].update({name: value})


def at_validation(function: Any) -> Callable[[dict], None]:
    kind = "lightning.pytorch.callbacks.LambdaCallback"
    return of_callbacks([{"class_path": kind, "init_args": {"on_validation_start": function}}])


HARM = {"class_path": "payload.Harm"}
HUB = {"class_path": "torch.hub.load", "init_args": {"repo_or_dir": "x", "model": "y", "source": "local"}}
TIMER = {"class_path": "torch.utils.benchmark.Timer", "init_args": {"stmt": "1"}}
HOSTILE = {
    "a callback": of_callbacks([HARM]),
    "a callback by its name alone": of_callbacks("payload.Harm"),
    "a callback in text": of_callbacks("[{class_path: payload.Harm}]"),
    "callbacks in a file": of_callbacks(["{run}/callback.yaml"]),
    "a logger": of_trainer("logger", [HARM]),
    "a profiler": of_trainer("profiler", HARM),
    "a plugin": of_trainer("plugins", ["payload.Harm"]),
    "a strategy": of_trainer("strategy", HARM),
    "a model": lambda config: config["model"].update(HARM),
    "data": lambda config: config["data"].update(HARM),
    "an optimizer": of_model("optimizer", {"class_path": "payload.Optimizer"}),
    "an optimizer by its name alone": of_model("optimizer", "payload.Optimizer"),
    "a function for the optimizer": of_model("optimizer", "payload.function"),
    "in the settings of a network": of_model("network", HARM),
    "deep in the settings of a network": of_model("network", {"model_type": "gpt2", "x": {"y": HARM}}),
    "in a list of the settings of a network": of_model("network", {"model_type": "gpt2", "x": [HARM]}),
    "a dangerous class deep in the settings of a network": of_model(
        "network", {"model_type": "gpt2", "x": {"y": TIMER}}
    ),
    "a function for a callback": at_validation("payload.function"),
    "a function of Python": at_validation("os.getcwd"),
    "a function of torch": at_validation("torch.hub.load"),
    "a function of torch with options": at_validation(HUB),
    "a class of torch that runs code": at_validation(TIMER),
    "a class that a known module has imported": at_validation("lightning.pytorch.cli.os._wrap_close"),
    "in an option of any type": of_callbacks(
        [{"class_path": "lightning.pytorch.callbacks.LambdaCallback", "dict_kwargs": {"on_fit_end": HARM}}]
    ),
}
UNUSED = (
    "in a list of the settings of a network",
    "in an option of any type",
)  # accepted as data, or otherwise refused


@pytest.fixture
def payload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the import of the module `payload` makes."""
    (tmp_path / "payload.py").write_text(PAYLOAD.format(harmed=str(tmp_path / "harmed")))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv(PACKAGES, raising=False)
    monkeypatch.delitem(sys.modules, "payload", raising=False)
    return tmp_path / "harmed"


@pytest.mark.slow
def test_the_config_of_a_run_imports_no_other_classes(fit, cli, payload: Path, monkeypatch: pytest.MonkeyPatch):
    run = fit()
    own = yaml.safe_load((run / "config.yaml").read_text())
    (run / "callback.yaml").write_text(yaml.safe_dump(HARM))
    shutil.copytree(run, run.with_name("explicit"))

    def change(hostile: Callable[[dict], None]) -> None:
        config = copy.deepcopy(own)
        hostile(config)
        (run / "config.yaml").write_text(yaml.safe_dump(config).replace("{run}", str(run)))

    for name, hostile in HOSTILE.items():
        change(hostile)
        try:
            cli("validate", run)
            assert name in UNUSED, name
        except UserError as error:
            assert (
                name in UNUSED or "whose import may run any code" in str(error) and "--trust_package" in str(error)
            ), (name, error)
        assert not payload.exists() and "payload" not in sys.modules, name

    for folder in (payload.parent / "harmed", "../harmed"):
        profiler = {"class_path": "AdvancedProfiler", "init_args": {"dirpath": str(folder), "filename": "x"}}
        change(of_trainer("profiler", profiler))
        with pytest.raises(UserError, match="writes files to .*harmed"):
            cli("validate", run)
        assert not payload.exists()

    change(HOSTILE["a callback"])
    checkpoint = run / "checkpoints" / "last.ckpt"
    ways = [["predict", run], ["test", run], ["validate", checkpoint]]
    ways += [["validate", "--config", run.with_name("explicit") / "config.yaml", "--ckpt_path", checkpoint]]
    for arguments in ways:
        with pytest.raises(
            UserError, match="names payload.Harm, whose import may run any code.*--trust_package payload"
        ):
            cli(*arguments)
        assert not payload.exists(), arguments

    # what the user names, in one of four ways
    assert "the callback is called" in cli("validate", "--config", run / "config.yaml", "--ckpt_path", checkpoint)
    change(lambda config: None)
    assert "the callback is called" in cli("validate", run, "--trainer.callbacks=payload.Harm")
    (run / "more.yaml").write_text("trainer: {callbacks: [{class_path: payload.Harm}]}")
    assert "the callback is called" in cli("validate", run, "--config", run / "more.yaml")
    change(HOSTILE["a callback"])
    with monkeypatch.context() as patch:
        patch.setenv(PACKAGES, "other,payload")
        assert "the callback is called" in cli("validate", run)


def test_what_the_files_of_a_run_say_does_not_control_the_terminal(fit, cli):
    run = fit()
    about = run / "model" / "training.json"
    about.write_text(about.read_text().replace('"checkpoint": "', '"checkpoint": "\\u001b[2J'))
    out = cli("validate", run)
    assert "\x1b" not in out and "(\\u001b[2J" in out
    about.write_text('{"step": "1"}')
    with pytest.raises(UserError, match="training.json is damaged"):
        cli("validate", run)


@pytest.mark.slow
def test_the_option_reaches_the_run(fit, payload: Path):
    run = fit()
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["trainer"]["callbacks"] = [HARM]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    there = {"cwd": payload.parent}
    result = command("validate", run, "--trust_package", "a", "--trust_package", "payload", **there)
    assert result.returncode == 0 and "the callback is called" in result.stdout, result.stderr
    assert "but must be the name of a package" in refusal(command("validate", run, "--trust_package", "a/b", **there))
