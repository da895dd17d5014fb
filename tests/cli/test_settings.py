"""Settings: config files in layers, flags over them, the defaults of classes, and text that stays text."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, needs

from lm_lightning import yaml_text
from lm_lightning.cli import settings
from lm_lightning.data.tokenizer import Tokenizer, train
from lm_lightning.errors import UserError
from lm_lightning.optim import MuonAdamW

GPT = ROOT / "configs" / "gpt.yaml"
SENTIMENT = ROOT / "configs" / "sentiment.yaml"


@pytest.fixture
def parsed(cli: Callable[..., str], capsys: pytest.CaptureFixture) -> Callable[..., dict[str, Any]]:
    """What a command line comes to: the complete settings."""

    def parse(*args: object) -> dict[str, Any]:
        with pytest.raises(SystemExit):
            cli(*args, "--print_config")
        return yaml.safe_load(capsys.readouterr().out)

    return parse


def write(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


# Order and layers


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_flag_wins_over_a_config_wherever_it_stands(parsed, command: str):
    before = parsed(command, "--trainer.max_steps", 7, "--config", GPT, "--data.batch_size=3")
    after = parsed(command, "--config", GPT, "--trainer.max_steps", 7, "--data.batch_size=3")
    assert before == after
    assert before["trainer"]["max_steps"] == 7 and before["data"]["init_args"]["batch_size"] == 3
    assert before["data"]["init_args"]["block_size"] == 128  # of the file


def test_prepare_takes_flags_before_the_config(cli, recipe: Path):
    assert cli("prepare", "--data.block_size", 16, "--config", recipe) == cli(
        "prepare", "--config", recipe, "--data.block_size", 16
    )


def test_the_last_of_several_files_wins_and_the_first_names_the_run(fit, recipe: Path, tmp_path: Path):
    more = write(tmp_path / "more.yaml", "trainer: {max_steps: 1}\nmodel: {init_args: {schedule: {warmup_steps: 0}}}\n")
    run = fit("--config", more, "--trainer.limit_val_batches", 1)
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert run.parent.name == recipe.stem and saved["trainer"]["max_steps"] == 1


def test_a_second_file_changes_a_dict_key_by_key(parsed, tmp_path: Path):
    more = write(tmp_path / "more.yaml", "model: {init_args: {network: {n_layer: 2}}}\n")
    network = parsed("fit", "--config", GPT, "--config", more, "--model.network.n_head=3")["model"]["init_args"][
        "network"
    ]
    expected = yaml.safe_load(GPT.read_text())["model"]["init_args"]["network"]
    assert network == expected | {"n_layer": 2, "n_head": 3}


def test_another_model_type_takes_none_of_the_old_settings(parsed, tmp_path: Path, capsys):
    more = write(tmp_path / "more.yaml", "model: {init_args: {network: {model_type: llama, hidden_size: 64}}}\n")
    settings.merge(options := settings.read(str(GPT)), settings.read(str(more)), "more.yaml")
    assert options["model"]["init_args"]["network"] == {"model_type": "llama", "hidden_size": 64}
    told = capsys.readouterr().err
    assert "model.network" in told and "llama" in told and "n_embd" in told


def test_a_flag_with_a_whole_dict_replaces_it_and_says_so(cli, capsys):
    with pytest.raises(UserError, match="accumulate_grad_batches"):  # so that nothing is trained
        cli(
            *("fit", "--config", GPT, "--model.network", "{model_type: gpt2, n_layer: 3}"),
            *("--trainer.accumulate_grad_batches", 0),
        )
    told = capsys.readouterr().err
    assert "model.network" in told and "n_embd" in told and "n_layer" not in told


@needs("generation")
def test_appended_callbacks_stand_beside_those_of_earlier_files(parsed, tmp_path: Path):
    early = "[{class_path: EarlyStopping, init_args: {monitor: val/loss}}]"
    more = write(tmp_path / "more.yaml", f"trainer: {{callbacks+: {early}}}\n")
    third = write(tmp_path / "third.yaml", "trainer: {callbacks+: {class_path: LearningRateMonitor}}\n")
    callbacks = parsed("fit", "--config", GPT, "--config", more, "--config", third)["trainer"]["callbacks"]
    assert [c["class_path"].rpartition(".")[2] for c in callbacks] == [
        "Samples",
        "EarlyStopping",
        "LearningRateMonitor",
    ]


def test_sections_in_files_of_their_own_and_dotted_keys_are_read(tmp_path: Path):
    write(tmp_path / "trainer.yaml", "max_steps: 3\n")
    file = write(tmp_path / "all.yaml", "trainer: trainer.yaml\ntrainer.max_epochs: 2\nmodel: CausalLM\n")
    assert settings.read(str(file)) == {
        "trainer": {"max_steps": 3, "max_epochs": 2},
        "model": {"class_path": "CausalLM"},
    }


# Text


@needs("tasks.classification")
def test_keys_are_the_text_that_was_written(parsed, tmp_path: Path):
    weights = "{0: 1, 01: 2, 1.50: 3, yes: 4, No: 5, null: 6, 2020-01-31: 7, U.S.: 8, true: 9, text: 10, 12:30: 11}"
    names = ["0", "01", "1.50", "yes", "No", "null", "2020-01-31", "U.S.", "true", "text", "12:30"]
    expected = {name: float(number) for number, name in enumerate(names, start=1)}
    file = write(tmp_path / "weights.yaml", f"model: {{init_args: {{class_weights: {weights}}}}}\n")
    assert parsed("fit", "--config", SENTIMENT, "--config", file)["model"]["init_args"]["class_weights"] == expected
    by_flag = parsed("fit", "--config", SENTIMENT, "--model.class_weights", weights)
    assert by_flag["model"]["init_args"]["class_weights"] == expected


@needs("tasks.classification")
def test_weights_of_labels_that_look_like_numbers_reach_them(cli, tmp_path: Path):
    folder = tmp_path / "tokenizer"
    train(Tokenizer(algorithm="wordpiece", vocab_size=100), iter(["one two number"] * 9), "bert").save_pretrained(
        folder
    )
    network = "{model_type: bert, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 16}"
    rows = [{"text": f"{word} number {n}", "label": n % 2} for n, word in enumerate(["one", "two"] * 20)]
    write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    file = write(tmp_path / "weights.yaml", "model: {init_args: {class_weights: {0: 1, 1: 5}}}\n")
    out = cli(
        *("fit", "--config", SENTIMENT, "--config", file, "--model.network", network, "--runs_dir", tmp_path),
        *("--data.tables.train", tmp_path / "rows.jsonl", "--data.tables.validation_fraction", 0.3),
        *("--trainer.max_epochs", 1, "--trainer.max_steps", 1, "--model.schedule.warmup_steps", 0),
        *("--trainer.val_check_interval", 1, "--trainer.accelerator", "cpu", "--data.tokenizer.path", folder),
    )
    saved = yaml.safe_load((Path(out.split("run folder: ")[1].splitlines()[0]) / "config.yaml").read_text())
    assert saved["model"]["init_args"]["class_weights"] == {"0": 1.0, "1": 5.0}


@needs("tasks.classification")
def test_column_names_are_text_or_refused_with_advice(parsed, cli):
    section = parsed("fit", "--config", SENTIMENT, "--data.tables.header", "[text, yes, on, 2020-01-31, 12:30, 010]")
    assert section["data"]["init_args"]["tables"]["header"] == ["text", "yes", "on", "2020-01-31", "12:30", "010"]
    for wrong in ("[text, 1]", "[text, true]", "[text, null]", "[text, 1.5]"):
        with pytest.raises(UserError, match="quotes"):
            cli("fit", "--config", SENTIMENT, "--data.tables.header", wrong)
    section = parsed("fit", "--config", SENTIMENT, "--data.tables.header", "[text, '1']")
    assert section["data"]["init_args"]["tables"]["header"] == ["text", "1"]


@pytest.mark.parametrize(
    "text", ["1e-3", "3.0e-5", "0.1", "-2", "1_000", ".5", "1.", "1e3", ".inf", "true", "null", "0x1f", "abc", "'1'"]
)
def test_values_mean_what_they_mean_elsewhere(text: str):
    assert yaml_text.load(text) == {"1e-3": 0.001, "1e3": 1000.0}.get(text, yaml.safe_load(text))


def test_anchors_and_merge_keys_work():
    text = "base: &base {lr: 1, betas: [0, 1]}\nother: {<<: *base, lr: 2}\nsame: *base\n"
    assert yaml_text.load(text) == yaml.safe_load(text)


@needs("tasks.classification")
def test_null_and_lists_reach_options_of_options(parsed):
    flags = ("--data.tokenizer.path", "x", "--data.tokenizer.path=null", "--data.tables.header", r'["a\\b", "it\'s"]')
    data = parsed("fit", "--config", SENTIMENT, *flags)["data"]["init_args"]
    assert data["tokenizer"]["path"] is None and data["tables"]["header"] == ["a\\b", "it's"]


@needs("tasks.classification")
def test_text_that_looks_like_a_number_survives_a_saved_config(parsed, tmp_path: Path):
    names = ["1e3", "yes", "010", "1.5", "null", "None", "12:30", "0x1f", "true"]
    file = write(tmp_path / "saved.yaml", yaml_text.dump({"data": {"init_args": {"tables": {"header": names}}}}))
    assert yaml_text.load(file.read_text()) == yaml.safe_load(file.read_text())
    assert parsed("fit", "--config", SENTIMENT, "--config", file)["data"]["init_args"]["tables"]["header"] == names


# The defaults of classes


def own_defaults(kind: type) -> dict[str, Any]:
    """The defaults of a class's own signature."""
    parameters = list(inspect.signature(kind).parameters.values())[1:]
    values = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


OPTIMIZERS = [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, torch.optim.NAdam, MuonAdamW]


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_an_optimizer_has_its_own_defaults(parsed, tmp_path: Path, kind: type):
    name = f"{'torch.optim' if kind.__module__.startswith('torch') else kind.__module__}.{kind.__name__}"
    spec = f"{{class_path: {name}, init_args: {{lr: 0.5}}}}"
    base = "model: {class_path: CausalLM, init_args: {%s}}\ndata: PretrainingData\n"
    new = write(tmp_path / "new.yaml", base % f"optimizer: {spec}")
    old = write(
        tmp_path / "old.yaml", base % "optimizer: {class_path: torch.optim.Adadelta, init_args: {eps: 1, lr: 3}}"
    )
    later = write(tmp_path / "later.yaml", f"model: {{init_args: {{optimizer: {spec}}}}}\n")
    ways = [
        parsed("fit", "--config", new),
        parsed("fit", "--config", old, "--config", later),
        parsed("fit", "--config", old, "--model.optimizer", name, "--model.optimizer.lr", 0.5),
        parsed("fit", "--config", old, "--model.optimizer", spec),
    ]
    for way in ways:
        assert way["model"]["init_args"]["optimizer"]["init_args"] == own_defaults(kind) | {"lr": 0.5}


@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/*.yaml")), ids=lambda file: file.stem)
def test_every_class_of_a_recipe_has_its_own_defaults(parsed, file: Path):
    given = yaml.safe_load(file.read_text())["model"]["init_args"].get("optimizer")
    if given is None:
        pytest.skip("a model without an optimizer")
    made = parsed("fit", "--config", file)["model"]["init_args"]["optimizer"]
    kind = MuonAdamW if given["class_path"].endswith("MuonAdamW") else torch.optim.AdamW
    assert made["init_args"] == own_defaults(kind) | given["init_args"]


def test_the_optimizer_is_made_with_its_own_betas(cli, recipe: Path, fit):
    run = fit("--model.optimizer", "lm_lightning.optim.MuonAdamW", "--trainer.max_steps", 3)
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]
    assert {group["betas"] for group in state["param_groups"] if "betas" in group} == {(0.9, 0.95)}


@needs("tasks.masked_lm")
def test_other_data_and_model_take_no_settings_along(parsed, cli, capsys):
    kept = parsed("fit", "--config", GPT, "--model", "MaskedLM", "--data", "MaskedData")
    plain = parsed("fit", "--model", "MaskedLM", "--data", "MaskedData")
    assert kept["data"] == plain["data"] and kept["model"] == plain["model"]
    with pytest.raises(UserError, match="accumulate_grad_batches"):
        cli("fit", "--config", GPT, "--data", "MaskedData", "--trainer.accumulate_grad_batches", 0)
    assert "block_size, batch_size" in capsys.readouterr().err


# One item or a list

PLUGIN = "lightning.pytorch.plugins.environments.LightningEnvironment"
STOP = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss"}}
ONE_OR_MORE = {
    "names": {"callbacks": "LearningRateMonitor", "logger": "CSVLogger", "plugins": PLUGIN},
    "mappings": {"callbacks": STOP, "logger": {"class_path": "CSVLogger"}, "plugins": {"class_path": PLUGIN}},
    "lists": {"callbacks": [STOP], "logger": ["CSVLogger"], "plugins": [PLUGIN]},
    "none": {"callbacks": None, "logger": False, "plugins": None},
    "true": {"logger": True},
}


@pytest.fixture(scope="module")
def trained() -> list:
    """Takes the checkpoint of the first run."""
    return []


@pytest.mark.slow
@pytest.mark.parametrize("options", ONE_OR_MORE.values(), ids=ONE_OR_MORE)
@pytest.mark.parametrize("way", ["flag", "file"])
def test_one_item_is_as_good_as_a_list(fit, cli, recipe: Path, tmp_path: Path, trained: list, options: dict, way: str):
    short = {"max_steps": 1, "val_check_interval": 1}
    short |= {f"limit_{name}_batches": 1 for name in ("val", "test", "predict")}
    file = write(tmp_path / "more.yaml", yaml.safe_dump({"trainer": short | (options if way == "file" else {})}))
    flags: list = ["--config", file, "--model.schedule.warmup_steps", 0]
    for option, value in options.items() if way == "flag" else ():
        text = yaml.safe_dump(value, default_flow_style=True, width=999).removesuffix("...\n").strip()
        flags += [f"--trainer.{option}", text]
    if not trained or way == "flag":
        run = fit(*flags)
        trained[:] = [(run / "checkpoints" / "last.ckpt").read_bytes()]
        names = {path.name for path in run.iterdir()}
        assert "model" in names and ("metrics.csv" in names) == (options["logger"] is True)
        assert ("lightning_logs" in names) == ("CSVLogger" in str(options))
    (checkpoint := tmp_path / "some.ckpt").write_bytes(trained[0])
    for command in ("validate", "test", "predict"):
        assert "evaluation folder" in cli(command, "--config", recipe, *flags, "--ckpt_path", checkpoint)
