"""What a terminal gets: characters that it lacks, control characters, and Ctrl-C at any time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import command, needs, paragraphs
from forks import python
from interrupts import ended_by_interrupt, interrupt, interrupt_at_any_time

from lm_lightning.console import printable

# Sends SIGINT to its own process where a module is about to be imported, then runs the command line.
INTERRUPTING = """
import os, runpy, signal, sys
module = sys.argv.pop(1)
class Finder:
    def find_spec(self, name, *_):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
runpy.run_module("lm_lightning", run_name="__main__", alter_sys=True)
"""


@needs("generation")
@pytest.mark.slow
def test_console_without_the_characters_of_a_sample_does_not_end_training(recipe: Path, tmp_path: Path):
    prompt = "Tür 漢字 \x1b[31m\x9b"
    samples = {"class_path": "lm_lightning.generation.samples.Samples", "init_args": {"prompts": [prompt]}}
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    result = command(
        *("fit", "--config", recipe, "--trainer.callbacks", json.dumps([samples]), "--trainer.max_steps", 5),
        *("--trainer.strategy", "ddp_spawn", "--trainer.devices", 1),  # what is printed comes from a child
        env=os.environ | ascii_only,
    )
    assert result.returncode == 0, result.stderr
    assert "sample: T\\xfcr \\u6f22\\u5b57 \\u001b[31m\\u009b|" in result.stdout
    (file,) = (tmp_path / "runs").glob("*/*/samples.jsonl")
    assert json.loads(file.read_text(encoding="utf-8").splitlines()[0])["prompt"] == prompt


def test_characters_that_a_console_lacks_are_escaped():
    code = "from lm_lightning import console; console.prepare(); print('Tür')"
    settings = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True)
    assert done.stdout == "T\\xfcr\n", done.stderr


def test_control_characters_are_shown_not_sent():
    assert printable("a\tb\nc\x1b]0;title\x07\r\x7f\x9b Ünï 👩‍🔬") == (
        "a\tb\nc\\u001b]0;title\\u0007\\u000d\\u007f\\u009b Ünï 👩‍🔬"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "args"),
    [("torch.autograd", ["fit", "--config", "x.yaml"]), ("jsonargparse", ["export", "."])],
)
def test_interrupt_during_an_import_ends_the_command(module: str, args: list[str]):
    result = subprocess.run(
        [sys.executable, "-c", INTERRUPTING, module, *args], capture_output=True, text=True, timeout=300
    )
    assert ended_by_interrupt(result.returncode, result.stderr), result


def test_interrupt_within_code_of_a_string_ends_the_command(tmp_path: Path):
    """As where a library makes a dataclass. Python remembers such an interrupt where a module is run with `-m`."""
    code = INTERRUPTING.replace("os.kill(os.getpid(), signal.SIGINT)", "exec('os.kill(os.getpid(), signal.SIGINT)')")
    (tmp_path / "interrupting.py").write_text(code, encoding="utf-8")
    words = [sys.executable, "-m", "interrupting", "jsonargparse", "prepare", "--config", os.devnull]
    settings = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    result = subprocess.run(words, env=settings, capture_output=True, text=True, timeout=300)
    assert ended_by_interrupt(result.returncode, result.stderr), result


LATE = """
import os, sys
from lm_lightning.__main__ import main

class Late:
    def __del__(self, kill=os.kill, process=os.getpid()):
        kill(process, 2)

late = Late()  # until Python has taken its signal handlers back
sys.argv = ["lm_lightning", "--help"]
main()
"""


def test_interrupt_of_a_finished_command_does_not_change_its_status():
    result = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "usage" in result.stdout, result


def test_interrupt_before_the_first_step_ends_fit(recipe: Path):
    status, errors, _ = interrupt(
        ["fit", "--config", recipe], lambda output, _: "run folder: " in output, python("lm_lightning")
    )
    assert ended_by_interrupt(status, errors), (status, errors)


@pytest.fixture
def long_model(tmp_path: Path) -> Path:
    """A network that writes for a long time, since the end token is out of the question."""
    from transformers import PhiConfig, PhiForCausalLM

    from lm_lightning.data.tokenizer import Tokenizer, train

    tokenizer = train(Tokenizer(algorithm="bytes"), iter(()), "gpt")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    network = PhiForCausalLM(PhiConfig(vocab_size=257, max_position_embeddings=100_000, **sizes))
    network.lm_head.bias.data[tokenizer.eos_token_id] = -1e4
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@needs("generation")
def test_interrupt_ends_generate(long_model: Path):
    args = ["generate", long_model, "--prompt", "begin", "--max_new_tokens", 50_000]
    status, errors, _ = interrupt(args, lambda output, _: len(output) > 10, python("lm_lightning"))
    assert ended_by_interrupt(status, errors), (status, errors)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1, 2, 3])
def test_interrupt_while_the_libraries_are_imported_ends_the_command(seconds: int, recipe: Path):
    args = ["fit", "--config", recipe, "--trainer.max_steps", 100_000]
    status, errors, _ = interrupt(args, lambda _, age: age > seconds)
    assert ended_by_interrupt(status, errors), (status, errors)


@pytest.mark.slow
@pytest.mark.parametrize(
    "args",
    [
        ["fit"],
        ["fit", "--trainer.strategy", "ddp", "--trainer.devices", "2"],
        ["prepare"],
    ],
    ids=" ".join,
)
def test_interrupt_at_any_time_ends_a_command_and_its_processes(args: list[str], recipe: Path, tmp_path: Path):
    flags = ["--config", recipe, *([] if args[0] == "prepare" else ["--trainer.max_steps", "100000"])]
    if args[0] == "prepare":  # which takes a moment only for the small corpus
        (tmp_path / "text.txt").write_text("\n\n".join(paragraphs(10_000)), encoding="utf-8")
        flags += ["--data.corpus.paths", str(tmp_path / "text.txt")]

    def trains() -> bool:
        return any(file.stat().st_size for file in tmp_path.glob("runs/*/*/metrics.csv"))

    interrupt_at_any_time([*args, *flags], tmp_path / "caches", trains)
