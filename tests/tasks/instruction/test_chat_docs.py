"""The commands of docs/chat.md."""

import io
import re
from pathlib import Path

import pytest
import yaml
from reading import Reader, under
from tables import write

CHATS = [
    {"messages": [{"role": "user", "content": f"Where is {i}?"}, {"role": "assistant", "content": f"At {i}."}]}
    for i in range(12)
]


@pytest.fixture
def reader(reader: Reader, finished: Path) -> Reader:
    """A reader with a pretrained GPT, whose context is short."""
    for file in Path("configs").glob("chat*.yaml"):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        content["data"]["init_args"]["max_length"] = 64
        content["model"]["init_args"]["max_new_tokens"] = 5
        content["trainer"]["max_epochs"] = 1
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
    write("train.jsonl", CHATS)
    write("dev.jsonl", CHATS[:3])
    write("new.jsonl", [{"prompt": "Where is 7?"}])
    write("pairs.csv", [{"source": f"Nacht {i}", "target": f"night {i}"} for i in range(30)])
    reader.base = finished
    return reader


@under("docs/chat.md", "Instruction tuning and chat")
def test_training_and_chat(reader: Reader, typed: list[list[str]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Where is 7?\n\n"))
    outs = reader.type_all(typed)
    assert "answers end with <|im_end|>" in outs[0] and outs[-1].startswith("> ") and outs[-1].endswith("> ")


@pytest.mark.slow
@under("docs/chat.md", "Conversations")
def test_templates_of_columns(reader: Reader, typed: list[list[str]]):
    (out,) = reader.type_all(typed)
    assert "train: " in out


@under("docs/chat.md", "What is trained")
def test_the_mask_is_shown(reader: Reader, typed: list[list[str]]):
    (out,) = reader.type_all(typed)
    pattern = r"  <\|im_start\|>user\n  Where is \d+\?<\|im_end\|>\n  <\|im_start\|>assistant\n> At \d+\.<\|im_end\|>\n"
    assert len(re.findall(rf"--- sample [01]\n{pattern}", out)) == 2
