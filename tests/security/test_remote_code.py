"""Python code in a model folder is not run, and nobody is asked: only `--trust_remote_code true` allows it."""

import json
import subprocess
from pathlib import Path

import pytest
from conftest import command, needs, refusal
from forks import python
from transformers import GPT2Config, GPT2LMHeadModel

from lm_lightning.__main__ import commands
from lm_lightning.data import tokenizer
from lm_lightning.data.tokenizer import Tokenizer

CODE = """
from pathlib import Path
from transformers import GPT2Config, GPT2LMHeadModel

Path({harmed!r}).touch()

class OwnConfig(GPT2Config):
    model_type = "own"

class OwnModel(GPT2LMHeadModel):
    config_class = OwnConfig
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with code that makes a file `harmed` when it is run."""
    model = tmp_path / "model"
    config = GPT2Config(vocab_size=300, n_layer=1, n_embd=8, n_head=1, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(model)
    tokenizer.train(Tokenizer(algorithm="bytes", vocab_size=300), iter(()), "gpt").save_pretrained(model)
    (model / "own.py").write_text(CODE.format(harmed=str(tmp_path / "harmed")))
    content = json.loads((model / "config.json").read_text())
    own = {name: f"own.{kind}" for name, kind in (("AutoConfig", "OwnConfig"), ("AutoModelForCausalLM", "OwnModel"))}
    (model / "config.json").write_text(json.dumps(content | {"model_type": "own", "auto_map": own}))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ("generate", "fit", "validate") if name in commands()])
def test_code_of_a_folder_is_not_run_even_if_yes_is_typed(name: str, folder: Path, recipe: Path, cache_dir: Path):
    flags = [
        "--config",
        recipe,
        "--model.network",
        "null",
        "--model.pretrained",
        folder,
        "--data.tokenizer.path",
        folder,
    ]
    arguments = [folder, "--prompt", "a"] if name == "generate" else flags
    start = [python("lm_lightning"), "-m", "lm_lightning", name, *map(str, arguments)]
    said = refusal(subprocess.run(start, input="y\n" * 9, capture_output=True, text=True, timeout=300))
    assert "its own Python code" in said and "--trust_remote_code true" in said
    assert not (folder.parent / "harmed").exists()


@needs("generation")
def test_code_is_run_on_request(folder: Path):
    done = command("generate", folder, "--prompt", "a", "--max_new_tokens", 2, "--trust_remote_code", "true")
    assert done.returncode == 0, done.stderr
    assert (folder.parent / "harmed").exists()
