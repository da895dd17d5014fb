"""Typical mistakes on a command line and in a config: each is one sentence that a new user understands."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, command, needs, refusal

from lm_lightning.__main__ import commands
from lm_lightning.errors import UserError

GPT = ROOT / "configs" / "gpt.yaml"
TEXT = needs("generation")
BASE = "model: {class_path: CausalLM}\ndata: {class_path: PretrainingData}\n"

FLAGS = [
    (
        "--trainer.max_step 3",
        "--trainer.max_step is not an option",
        "did you mean --trainer.max_steps?",
    ),  # no abbreviations
    ("--model.schedule.warmup 3", "--model.schedule.warmup is not an option", "--model.schedule.warmup_steps"),
    ("--max_steps 3", "--max_steps is not an option", "--trainer.max_steps"),
    ("--epochs 3", "--epochs is not an option", "--trainer.max_epochs"),
    ("--learning_rate 3", "--model.optimizer.lr"),
    ("--model.lr 3", "--model.lr is not an option of CausalLM", "--model.optimizer.lr"),
    ("--model.optimizer.learning_rate 3", "not an option of MuonAdamW", "--model.optimizer.lr"),
    ("--trainer.batch_size 3", "--data.batch_size"),
    ("--data.corpus.path x", "not an option of PretrainingData", "--data.corpus.paths"),
    ("--model.optimizer.lr nan", "--model.optimizer.lr is 'nan'", "must be a number"),
    ("--model.optimizer.lr=fast", "--model.optimizer.lr is 'fast'", "must be a number"),
    ("--model.optimizer.betas [0.9]", "must be a list of 2 values"),
    ("--trainer.max_steps many", "--trainer.max_steps is 'many'", "must be a whole number"),
    ("--trainer.max_steps 1.5", "is '1.5'", "a whole number"),
    ("--trainer.max_steps=", "--trainer.max_steps is empty", "a whole number"),
    ("--trainer.gradient_clip_val high", "must be a number or null"),
    ("--model.compile maybe", "must be true or false"),
    ("--model.schedule.shape cos", "one of cosine, linear, constant, wsd", "did you mean cosine?"),
    ("--trainer.precision bf17", "bf16-mixed", "did you mean bf16?"),
    ("--model.freeze 3", "--model.freeze is '3'", "must be a list"),
    ("--model.network gpt2", "--model.network is 'gpt2'", "options by name"),
    ("--data.tokenizer 3", "--data.tokenizer is '3'", "options by name"),
    ("--trainer fast", "--trainer is 'fast'", "options by name"),
    ("--model GPT", "--model is 'GPT'", "CausalLM"),
    ("--model torch.nn.Linear", "not a subclass of LanguageModule"),
    ("--data no.Such", "not a subclass of LightningDataModule", "use one of PretrainingData"),
    ("--data PretrainingDat", "did you mean PretrainingData?"),
    ("--trainer.callbacks EarlyStoping", "did you mean EarlyStopping?"),
    ("--trainer.callbacks EarlyStopping", "needs --trainer.callbacks.monitor"),
    ("--trainer.callbacks [{class_path: EarlyStopping, init_args: {monitr: 3}}]", "trainer.callbacks.monitor?"),
    ("--model.optimizer torch.optim.AdamWW", "did you mean AdamW?"),
    ("--data.batch_size --trainer.max_steps 3", "--data.batch_size has no value"),
    ("--name", "--name has no value"),
    ("stray", "'stray' does not belong to an option"),
    ("-x 1", "-x is not an option"),
    ("--trainer.devices x", "devices"),
    ("--trainer.strategy dpp", "there is no strategy dpp"),
    ("--trainer.accelerator gpuu", "Available names are", "cpu"),
    ("--model.optimizer.lr .nan", "Invalid learning rate"),
    ("--model.network.n_layers 2", "did you mean n_layer?"),
]


def arguments(flags: str) -> list[str]:
    """The flags, of which only the last value has spaces."""
    head, _, rest = flags.partition(" ")
    return [head, rest] if rest.startswith("[") else flags.split()


@pytest.mark.parametrize(("flags", "phrases"), [(flags, phrases) for flags, *phrases in FLAGS], ids=str)
def test_a_wrong_flag_is_one_clear_sentence(cli: Callable[..., str], recipe: Path, flags: str, phrases: list[str]):
    config = GPT if "learning_rate" in flags else recipe
    with pytest.raises(UserError) as refused:
        cli("fit", "--config", config, *arguments(flags))
    check(str(refused.value), phrases)


@needs("tasks.classification", "tasks.tagging", "lora")
@pytest.mark.parametrize(
    ("flags", "phrases"),
    [
        ("--data.tables.train x", ["not an option of PretrainingData", "but of ClassificationData", "TaggingData"]),
        ("--model.class_weights x", ["not an option of CausalLM", "but of Classification"]),
        ("--model.adapter LoRa", ["did you mean LoRA?"]),
    ],
)
def test_a_flag_of_another_class_is_one_clear_sentence(cli, recipe: Path, flags: str, phrases: list[str]):
    test_a_wrong_flag_is_one_clear_sentence(cli, recipe, flags, phrases)


def check(message: str, phrases: list[str]) -> None:
    assert all(phrase in message for phrase in phrases), message
    for inner in ("\n", "Parser key", "<class", "typing.", "Optional[", "Union", "Namespace", "NestedArg", "Subtypes"):
        assert inner not in message


FILES = {
    "tab": ("model:\n\tclass_path: CausalLM\n", "line 2", "tab"),
    "duplicate": (BASE + "trainer: {max_steps: 3}\ntrainer: {max_epochs: 2}\n", "line 4", "'trainer' is given twice"),
    "empty": ("# nothing\n", "is empty"),
    "binary": (bytes(range(256)), "cannot be read as UTF-8 text"),
    "latin-1": ("name: caf\xe9\n".encode("latin-1"), "cannot be read as UTF-8 text"),
    "list": ("- a\n- b\n", "no options by name"),
    "colon": ("model: class_path: x\n", "line 1", "colon"),
    "bracket": ("trainer: {max_steps: 3\nname: x\n", "bracket"),
    "alias": (BASE + "trainer: {max_steps: *x}\n", "line 3", "quotes"),
    "nesting": (BASE + "max_steps: 3\n", "line 3: max_steps is not an option", "did you mean trainer.max_steps?"),
    "no init_args": ("model:\n  class_path: CausalLM\n  network: {model_type: gpt2}\n" + BASE[30:], "init_args"),
    "wrong place": (
        "model:\n  class_path: CausalLM\n  init_args:\n    lr: 1e-3\ndata: PretrainingData\n",
        *("line 4: model.lr is not an option of CausalLM", "model.optimizer.lr"),
    ),
    "class": ("data: PretrainingData\nmodel: {class_path: GPTLM}\n", "line 2: model is 'GPTLM'", "CausalLM"),
    "type": (BASE + "trainer:\n  max_epochs: 2\n  max_steps: many\n", "line 5: trainer.max_steps is 'many'", "whole"),
    "text": (BASE + "trainer: fast\n", "line 3: trainer is 'fast'", "options by name"),
    "no model": ("data: PretrainingData\n", "has no model section", "CausalLM"),
    "number for text": (BASE + "name: 2026\n", "line 3: name has 2026", "a number", "quotes"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_wrong_config_is_one_clear_sentence_with_its_line(cli: Callable[..., str], tmp_path: Path, case: str):
    content, *phrases = FILES[case]
    file = tmp_path / "my.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as refused:
        cli("fit", "--config", file)
    check(str(refused.value), [str(file), *phrases])


def test_a_config_that_is_no_file_is_told_with_what_may_be_meant(cli: Callable[..., str], tmp_path: Path):
    for name, phrase in (
        (ROOT / "configs", "is a folder, but must be a file"),
        (ROOT / "configs" / "gtp.yaml", "did you mean"),
        (tmp_path / "none.yaml", "there is no config file"),
    ):
        with pytest.raises(UserError, match=phrase):
            cli("fit", "--config", name)
    with pytest.raises(UserError, match="--config has no value"):
        cli("fit", "--config")


def test_fit_without_a_config_suggests_one(cli: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="fit needs a config.*--config configs/gpt.yaml.*configs/llama.yaml"):
        cli("fit")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="fit needs a config: .*--config FILE"):
        cli("fit", "--trainer.max_steps", 3)


@pytest.mark.parametrize(
    ("flags", "phrase"),
    [
        pytest.param(
            ("generate", "RUN", "--promt", "x"), "--promt is not an option: did you mean --prompt?", marks=TEXT
        ),
        pytest.param(("generate", "RUN", "--max_new", "3"), "--max_new is not an option", marks=TEXT),
        pytest.param(("generate", "RUN", "--top_k", "many"), "but must be a whole number", marks=TEXT),
        (("export", "RUN", "--checkpont", "x"), "did you mean --checkpoint?"),
        (("export",), "export needs RUN: see `python -m lm_lightning export --help`"),
        (("validate",), "validate needs a run: python -m lm_lightning validate RUN"),
        (("predict",), "predict needs a run: python -m lm_lightning predict RUN"),
        pytest.param(("compress",), "compress needs MODEL: see", marks=needs("compression")),
        pytest.param(("search",), "search needs INDEX, QUERY: see", marks=needs("tasks.embedding")),
        (("prepare", "--config", GPT, "--data.block_siz", "3"), "did you mean --data.block_size?"),
    ],
    ids=str,
)
def test_other_commands_refuse_in_the_same_way(cli: Callable[..., str], flags: tuple, phrase: str):
    with pytest.raises(UserError) as refused:
        cli(*flags)
    check(str(refused.value), [phrase])


def test_the_help_of_fit_begins_with_examples(cli: Callable[..., str], capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        cli("fit", "--help")
    out = capsys.readouterr().out
    lines = out.splitlines()
    begin = "\n".join(lines[:40])
    assert lines[0] == "usage: python -m lm_lightning fit --config FILE [--option VALUE ...]"
    for phrase in (
        "--config configs/gpt.yaml",
        "--model.help CausalLM",
        "--data.help PretrainingData",
        "Recipes in configs/: ",
        "llama",
    ):
        assert phrase in begin
    for option in ("--trainer.max_steps", "--model.optimizer.lr", "--data.batch_size", "--ckpt_path last"):
        assert option in begin
    for title in (
        "Model:",
        "Data:",
        "Checkpoint to load:",
        "Newest checkpoint, from which a run is resumed, in checkpoints/last.ckpt:",
    ):
        assert title in lines
    assert "Default: ``'32-true'``" not in out and "natively" in out  # the default of Lightning is another


@pytest.mark.parametrize("name", sorted(commands().keys() - {"fit", "test"}))
def test_every_help_has_the_name_that_a_user_types(cli: Callable[..., str], capsys, name: str):
    with pytest.raises(SystemExit):
        cli(name, "--help")
    assert capsys.readouterr().out.startswith(f"usage: python -m lm_lightning {name} ")


@pytest.mark.parametrize("section", ["model", "data"])
def test_the_help_of_a_class_has_the_name_that_a_user_types(cli: Callable[..., str], capsys, section: str):
    with pytest.raises(SystemExit):
        cli("fit", f"--{section}.help", {"model": "CausalLM", "data": "PretrainingData"}[section])
    assert capsys.readouterr().out.startswith(f"usage: python -m lm_lightning fit [--{section}.")


def test_the_console_script_has_its_own_name(cli: Callable[..., str], monkeypatch: pytest.MonkeyPatch):
    from lm_lightning.cli import explain

    monkeypatch.setattr("sys.argv", ["/usr/bin/lm-lightning", "fit"])
    assert explain.program("fit") == "lm-lightning fit"


def test_a_wrong_command_is_told_what_there_is():
    assert "did you mean fit?" in refusal(command("fti"))
    assert "the command comes first" in refusal(command("--config", "configs/gpt.yaml", "fit"))
