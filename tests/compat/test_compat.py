"""What `lm_lightning.compat` uses of other libraries is there, and behaves as we assume."""

import dataclasses
import importlib.util
import inspect
import pkgutil
import random
import re
import subprocess
import warnings
from pathlib import Path

import jsonargparse
import lightning
import pytest
import torch
import torchmetrics
import transformers
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loops.evaluation_loop import RestartStage

from lm_lightning.compat import jsonargparse as of_jsonargparse
from lm_lightning.compat import lightning as of_lightning
from lm_lightning.compat import torch as of_torch
from lm_lightning.compat import transformers as of_transformers


def sources(package) -> str:
    """The source of a package's Python files, with strings that were broken over lines put together."""
    texts = (file.read_text(encoding="utf-8") for file in Path(package.__file__).parent.rglob("*.py"))
    return re.sub(r"[\"']\s*\n\s*f?[\"']", "", "\n".join(texts))


@pytest.mark.parametrize("override", of_lightning.OVERRIDES, ids=lambda override: override.method)
def test_overridden_private_methods_are_those_of_lightning(override: of_lightning.Override):
    base, ours = pkgutil.resolve_name(override.base), pkgutil.resolve_name(override.ours)
    assert issubclass(ours, base) and override.method in vars(ours), "remove it from OVERRIDES"
    own, theirs = (inspect.signature(getattr(kind, override.method)).parameters for kind in (ours, base))
    assert list(own) == list(theirs)
    calls = re.findall(rf"self\.{override.method}\(", sources(lightning))
    assert calls, "Lightning does not call it any more"


def test_expected_warnings_are_still_those_of_lightning():
    text = re.sub(r"\{[^{}]*\}", "X", sources(lightning)).replace("\\", "")
    missing = [message for message in of_lightning.EXPECTED_WARNINGS if not re.search(message, text)]
    assert not missing, "remove them"
    others = sources(torchmetrics) + (Path(torch.__file__).parent / "utils" / "_pytree.py").read_text()
    text = re.sub(r"\{[^{}]*\}", "X", others)
    assert "SpearmanCorrcoef` will save all" in text and "isinstance(treespec, LeafSpec)` is deprecated" in text


def test_expected_warnings_are_hidden_and_others_are_not():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        of_lightning.hide_expected_warnings()
        warnings.warn("You are using a custom batch sampler `X`", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["something else"]


class Observed(lightning.pytorch.Callback):
    """Asks the loops in training."""

    def __init__(self) -> None:
        self.due: list[bool] = []
        self.steps: list[int] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        of_lightning.disable_signal_broadcast(trainer)
        of_lightning.set_logged_steps(trainer, 100)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        self.due.append(of_lightning.validation_is_due(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.steps.append(trainer.fit_loop.epoch_loop._batches_that_stepped)


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Trainer, Observed]:
    """A trainer after 4 steps, with validations after every second."""
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    options |= {"max_epochs": 1, "limit_train_batches": 4, "val_check_interval": 2, "num_sanity_val_steps": 0}
    observed = Observed()
    trainer = Trainer(**options, callbacks=[observed], default_root_dir=tmp_path, enable_model_summary=False)
    trainer.fit(BoringModel())
    return trainer, observed


def test_the_loops_have_what_resuming_and_preemption_use(trained):
    trainer, observed = trained
    assert observed.due == [False, True, False, True]
    assert observed.steps == [101, 103]
    loop = trainer.fit_loop.epoch_loop
    assert isinstance(trainer.fit_loop, of_lightning.LightningFitLoop)
    assert {"skip", "on_iteration_done", "on_run_end"} <= set(dir(of_lightning.LightningFitLoop))
    assert "_broadcast_sigterm_tensor()" in inspect.getsource(type(loop).advance)

    of_lightning.repeat_validation(trainer)
    assert loop.val_loop.restarted_mid_evaluation
    assert loop.val_loop._restart_stage == RestartStage.RESTARTED_MID_EVALUATION
    loop.val_loop._has_run = False
    of_lightning.mark_epoch_validated(trainer)
    assert loop.val_loop._has_run is True
    assert "val_loop._has_run" in inspect.getsource(type(loop))
    environment = of_lightning.cluster_environment(trainer)
    assert isinstance(environment, lightning.fabric.plugins.environments.LightningEnvironment)


def test_callbacks_keep_their_arguments():
    early, chosen = EarlyStopping("val/loss"), EarlyStopping("val/loss", check_on_train_epoch_end=True)
    for callback in (early, chosen):
        of_lightning.check_after_validation(callback)
    assert (early._check_on_train_epoch_end, chosen._check_on_train_epoch_end) == (False, True)
    assert of_lightning.saves_by_default(ModelCheckpoint())
    assert not of_lightning.saves_by_default(ModelCheckpoint(save_on_train_epoch_end=True))


def test_a_csv_logger_closes_the_writer_that_it_has(tmp_path: Path):
    logger, saved = CSVLogger(tmp_path), []

    class Writer(ExperimentWriter):
        def save(self) -> None:
            saved.append(self)

    writer = of_lightning.writer_of(logger, lambda: Writer(str(tmp_path / "logs")))
    assert of_lightning.writer_of(logger, lambda: None) is writer is logger.experiment  # type: ignore[arg-type]
    logger.finalize("success")
    assert saved == [writer]


def test_a_subcommand_has_a_parser_of_its_own():
    cli = LightningCLI.__new__(LightningCLI)
    cli._subcommand_parsers = {"fit": LightningArgumentParser()}
    cli.subcommand = "fit"
    assert of_lightning.subcommand_parser(cli, "fit") is cli._subcommand_parsers["fit"]


class Base:
    """The base of two classes with settings."""

    def __init__(self, size: int = 1) -> None:
        self.size = size


class Other(Base):
    """A class with its own default."""

    def __init__(self, size: int = 2) -> None:
        super().__init__(size)


@dataclasses.dataclass
class Part:
    """Options within those of a class."""

    size: int = 1


class Nested:
    """A class with such options."""

    def __init__(self, part: Part = Part()) -> None:
        self.part = part


def test_parsers_of_jsonargparse():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Base, "base", help="a base")
    parser.add_argument("--config", action="config")
    assert {"--base.size", "--config"} <= set(of_jsonargparse.option_names(parser))
    of_jsonargparse.set_help(parser, {"base.size": "how much of it"}, {"base": "the foundation"})
    shown = parser.format_help()
    assert "how much of it" in shown and "the foundation:" in shown and "a base" not in shown
    assert not of_jsonargparse.parses_class_options(parser)


def test_options_of_a_class_have_an_inner_parser():
    seen = []

    class Parser(jsonargparse.ArgumentParser):
        def parse_args(self, *args, **kwargs):
            seen.append(of_jsonargparse.parses_class_options(self))
            return super().parse_args(*args, **kwargs)

    parser = Parser(exit_on_error=False)
    parser.add_subclass_arguments(Nested, "nested")
    parser.parse_args([f"--nested={__name__}.Nested", "--nested.part.size=3"])
    assert True in seen and False in seen


def test_another_class_begins_with_its_own_defaults(monkeypatch):
    monkeypatch.setattr(jsonargparse._typehints, "discard_init_args_on_class_path_change", None)
    of_jsonargparse.install_class_settings()
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Base, "base", default=jsonargparse.lazy_instance(Base, size=5))
    parsed = parser.parse_args([f"--base={__name__}.Other"])
    assert parsed.base.init_args.size == 2


def test_imports_that_values_name_are_guarded(monkeypatch):
    asked = []

    def guarded(function):
        def wrapped(name, *args, **kwargs):
            asked.append(name)
            return function(name, *args, **kwargs)

        return wrapped

    for module in (jsonargparse._actions, jsonargparse._typehints):
        monkeypatch.setattr(module, "import_object", module.import_object)
    of_jsonargparse.guard_imports(guarded)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Base, "base")
    parser.parse_args([f"--base={__name__}.Other"])
    assert f"{__name__}.Other" in asked


def test_types_in_stub_files_are_found_without_another_python(monkeypatch):
    def start(*_, **__):
        raise AssertionError("a process is started")

    monkeypatch.setattr(jsonargparse._stubs_resolver, "stubs_resolver", None)
    monkeypatch.setattr(subprocess, "check_output", start)
    of_jsonargparse.find_stubs_in_process()
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(random.uniform)  # has no annotations of its own
    assert parser.parse_args(["--a=1", "--b=2"]) == jsonargparse.Namespace(a=1.0, b=2.0)
    with pytest.raises(jsonargparse.ArgumentError, match="float"):
        parser.parse_args(["--a=1", "--b=x"])


def test_options_are_found_as_jsonargparse_finds_them(monkeypatch):
    parser, inner = (jsonargparse.ArgumentParser(exit_on_error=False) for _ in range(2))
    inner.add_argument("--config", action="config")
    inner.add_subclass_arguments(Base, "base")
    inner.add_argument("-n", "--number", "--times", type=int, default=1)
    parser.add_argument("--fit")  # like the subcommand
    parser.add_subcommands().add_subcommand("fit", inner)
    core, subcommands = jsonargparse._core, jsonargparse._subcommands
    source = importlib.util.spec_from_file_location("jsonargparse._unchanged", subcommands.__file__)
    unchanged = importlib.util.module_from_spec(source)
    source.loader.exec_module(unchanged)
    monkeypatch.setattr(unchanged, "ActionSubCommands", subcommands.ActionSubCommands)
    for module in (core, subcommands):
        monkeypatch.setattr(module, "find_action_and_subcommand", unchanged.find_action_and_subcommand)
    of_jsonargparse.find_options_by_name()
    assert core.find_action_and_subcommand is subcommands.find_action_and_subcommand
    names = ["base", "base.help", "number", "times", "n", "config", "help", "nothing", "fit", "subcommand"]
    for name in [*names, *(f"fit.{name}" for name in names)]:
        for kind in (None, jsonargparse._actions._ActionConfigLoad, jsonargparse._typehints.ActionTypeHint):
            found, expected = (m.find_action_and_subcommand(parser, name, kind) for m in (core, unchanged))
            assert found[0] is expected[0] and found[1] == expected[1], name
    assert core.find_action_and_subcommand(parser, "fit.later")[0] is None
    inner.add_argument("--later")
    assert core.find_action_and_subcommand(parser, "fit.later")[0].dest == "later"


def test_values_that_yaml_cannot_hold_are_marked():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=object)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = parser.dump(jsonargparse.Namespace(value=object()), skip_validation=True)
    assert of_jsonargparse.UNSAVEABLE in text


def test_tensors_are_multiplied_in_place():
    tensors = [torch.ones(2), torch.full((3,), 2.0)]
    of_torch.multiply(tensors, torch.tensor(3.0))
    assert tensors[0].tolist() == [3, 3] and tensors[1].tolist() == [6, 6, 6]


def test_the_class_that_a_checkpoint_must_not_have_is_named(tmp_path: Path):
    torch.save({"a": Base()}, tmp_path / "a.ckpt")
    with pytest.raises(Exception, match="Weights only"):
        torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / "a.ckpt") == [f"{__name__}.Base"]


def test_bfloat16_of_the_cpu_is_known():
    names = [name for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported") if hasattr(torch.cpu, name)]
    assert names and of_torch.cpu_computes_bf16() in (True, False)


def test_the_report_of_loaded_weights_is_hidden_and_other_messages_are_not(tmp_path: Path, caplog):
    config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=8, n_positions=8)
    transformers.GPT2Model(config).save_pretrained(tmp_path)
    transformers.utils.logging.set_verbosity_warning()  # another test may have changed it
    logger = transformers.utils.logging.get_logger("transformers.modeling_utils")
    logger.disabled = False  # import-linter disables all loggers that exist
    logger.removeFilter(of_transformers.no_load_report)
    logger.addHandler(caplog.handler)
    try:
        transformers.BertModel.from_pretrained(tmp_path)
        assert any(not of_transformers.no_load_report(record) for record in caplog.records), "it has another title"
        caplog.clear()
        of_transformers.hide_load_report()
        transformers.BertModel.from_pretrained(tmp_path)
        logger.warning("something else")
        assert [record.getMessage() for record in caplog.records if "REPORT" in record.getMessage()] == []
        assert "something else" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


def test_settings_that_transformers_refuses_are_found_in_its_message():
    config = transformers.GenerationConfig.from_dict({"do_sample": False, "temperature": 0.5, "top_p": 0.3})
    with pytest.raises(ValueError) as refused:
        config.validate(strict=True)
    assert {"temperature", "top_p"} <= set(of_transformers.refused_settings(refused.value))


def test_messages_of_lost_peers_are_recognized():
    for message in (
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2345",
        "Connection reset by peer",
        "NCCL error: remote process exited or there was a network error",
        "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
    ):
        assert of_torch.LOST_PEER.search(message)
