"""Models and runs of other people: `compress` runs none of their code, and writes nowhere else."""

import json
import sys
from pathlib import Path

import pytest
import transformers
import yaml
from hostile import Guard, attack, mutations

from lm_lightning.compression.folder import copy_other_files, load
from lm_lightning.data import tokenizer
from lm_lightning.data.tokenizer import Tokenizer
from lm_lightning.errors import UserError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder."""
    folder = tmp_path / "model"
    config = transformers.GPT2Config(vocab_size=300, n_layer=1, n_embd=8, n_head=1, n_positions=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.train(Tokenizer(algorithm="bytes", vocab_size=300), iter(()), "gpt").save_pretrained(folder)
    return folder


@mutations(200)
def test_damaged_models(model: Path, guard: Guard, tmp_path: Path, seeds: range):
    attack(model, load, seeds, guard, tmp_path)


def test_a_model_folder_whose_modules_are_elsewhere_is_not_copied(tmp_path: Path):
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target, tmp_path / "payload"):
        folder.mkdir()
    (tmp_path / "payload" / "file").write_text("x")
    (source / "modules.json").write_text(json.dumps([{"path": "../payload"}]))
    with pytest.raises(UserError, match="modules.json"):
        copy_other_files(source, target)
    assert not (target.parent / "payload" / "payload").exists() and not list(target.glob("**/file"))


def test_code_of_a_model_folder_is_not_run(cli, model: Path, tmp_path: Path):
    (model / "own.py").write_text(f"open({str(tmp_path / 'harmed')!r}, 'w')\n")
    config = json.loads((model / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (model / "config.json").write_text(json.dumps(config | own))
    with pytest.raises(UserError, match="its own Python code.*--trust_remote_code true"):
        cli("compress", model, "--recipe", "none")
    assert not (tmp_path / "harmed").exists()


def test_classes_that_the_config_of_a_run_names_are_not_imported(fit, cli, tmp_path: Path, monkeypatch):
    run = fit("--trainer.max_steps", 3)
    (tmp_path / "payload.py").write_text("from lightning.pytorch import Callback\nclass Harm(Callback):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["trainer"]["callbacks"] = [{"class_path": "payload.Harm"}]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="names payload.Harm.*--trust_package payload"):
        cli("compress", run, "--recipe", "none")
    assert "payload" not in sys.modules


def test_a_run_with_links_to_elsewhere_is_refused(fit, cli, tmp_path: Path):
    run = fit("--trainer.max_steps", 3)
    (tmp_path / "outside").write_text("mine")
    (run / "model" / "extra.json").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="is a link to .*outside"):
        cli("compress", run, "--recipe", "sparse=0.5", "--measure", "false")
    assert not (run / "compressed").exists() and (tmp_path / "outside").read_text() == "mine"
