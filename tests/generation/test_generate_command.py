"""The command `generate`."""

import io
import json
from pathlib import Path

import pytest
from conftest import command, refusal

from lm_lightning.errors import UserError
from lm_lightning.generation import generate


@pytest.fixture
def run(finished: Path) -> Path:
    return finished


def test_generated_text_of_a_prompt_is_the_same_alone_and_beside_others(cli, run: Path, tmp_path: Path):
    prompts = ["The", "7 The old captain watched the lantern before the", "My neighbour forgot"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    for flags in (("--greedy", "true"), ("--temperature", 1.2, "--top_p", 0.95, "--seed", 3)):
        out = cli("generate", run, "--prompts_file", tmp_path / "prompts.txt", "--max_new_tokens", 12, *flags)
        together = [json.loads(line) for line in out.splitlines()]
        assert [answer["prompt"] for answer in together] == prompts
        for answer in together:
            alone = cli("generate", run, "--prompt", answer["prompt"], "--max_new_tokens", 12, *flags)
            assert alone.rstrip("\n") == (answer["prompt"] + answer["text"]).rstrip("\n")


def test_seed_decides_the_text(cli, run: Path):
    def text(seed: int) -> str:
        return cli("generate", run, "--prompt", "The", "--max_new_tokens", 20, "--temperature", 1.5, "--seed", seed)

    assert text(1) == text(1) != text(2)


def test_greedy_text_is_that_of_transformers(cli, run: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = tokenizer("The old", return_tensors="pt")
    expected = tokenizer.decode(model.generate(**ids, max_new_tokens=20, do_sample=False)[0], skip_special_tokens=True)
    out = cli("generate", run, "--prompt", "The old", "--max_new_tokens", 20, "--greedy", "true")
    assert out.rstrip("\n") == expected.rstrip("\n")


def test_overlong_prompt_names_the_limit_and_a_short_rest_is_told(cli, run: Path, capsys):
    with pytest.raises(UserError, match="context length of the network is 64"):
        cli("generate", run, "--prompt", "The old captain watched the lantern. " * 20)
    result = command("generate", run, "--prompt", "The old captain", "--max_new_tokens", 100)
    assert result.returncode == 0 and "leaves room for" in result.stderr


def test_chat_remembers_and_ends(cli, run: Path, monkeypatch: pytest.MonkeyPatch):
    contexts, answers = [], []
    stream = generate.stream

    def watched(network, tokenizer, ids: list[int], *rest: object) -> str:
        contexts.append(tokenizer.decode(ids, skip_special_tokens=True))
        answers.append(stream(network, tokenizer, ids, *rest))
        return answers[-1]

    monkeypatch.setattr(generate, "stream", watched)
    monkeypatch.setattr("sys.stdin", io.StringIO("The girl\nThe cat\n\nafter the end\n"))
    out = cli("generate", run, "--chat", "true", "--max_new_tokens", 5)
    assert contexts == ["The girl\n", f"The girl\n{answers[0]}\nThe cat\n"]
    assert out.split("> ") == ["", *(f"{answer}\n" for answer in answers), ""] and all(answers)


def test_generate_refuses_what_is_no_model(cli, tmp_path: Path):
    with pytest.raises(UserError, match="neither a run folder nor a from_pretrained folder"):
        cli("generate", tmp_path, "--prompt", "a")
    run = tmp_path / "runs" / "gpt" / "first"
    run.mkdir(parents=True)
    for name in ("config.yaml", "metrics.csv"):
        (run / name).touch()
    for arguments in (("generate", run.parent, "--prompt", "a"), ("validate", run.parent)):
        with pytest.raises(UserError, match="gpt is not a run folder, but contains 1 of them: give .*first"):
            cli(*arguments)
    (tmp_path / "novel.txt").write_text("words")
    with pytest.raises(UserError, match="novel.txt is a file, but must be the folder of a run or a model"):
        cli("generate", tmp_path / "novel.txt", "--prompt", "a")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="lm_lightning export"):
        cli("generate", tmp_path, "--prompt", "a")
    assert "only one of" in refusal(command("generate", tmp_path, "--prompt", "a", "--chat", "true"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--temperature", 0), "temperature is 0.0, but must be a number above 0: for deterministic text, use greedy"),
        (("--top_p", 1.5), "top_p is 1.5, but must be above 0 and at most 1"),
        (("--top_k", -1), "top_k is -1"),
        (("--max_new_tokens", 0), "max_new_tokens is 0, but must be 1 or more"),
    ],
)
def test_impossible_settings_are_refused_before_the_model_is_loaded(cli, monkeypatch, flags: tuple, message: str):
    monkeypatch.setattr(generate, "load", lambda *_: pytest.fail("the model is loaded"))
    with pytest.raises(UserError, match=message):
        cli("generate", "model", *flags)
