"""Instruction tuning: what is trained on is what a chat reads, answers end, and nothing is left out unnoticed."""

import csv
import io
import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, command, evaluation, needs, paragraphs
from forks import python
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_lightning.data import tokenizer as tokenizers
from lm_lightning.errors import UserError
from lm_lightning.finetuning.store import Store, StoreWriter
from lm_lightning.finetuning.tables import Row
from lm_lightning.generation.chat import TEMPLATES, ChatFormat
from lm_lightning.tasks.instruction.conversations import ConversationColumns, conversation
from lm_lightning.tasks.instruction.examples import Packs, TokenizedConversations, pack

SCRIPT = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
found = []
for prompt in json.load(sys.stdin):
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=60)[0]
    ids = inputs["input_ids"][0].tolist()
    found.append([ids, tokenizer.decode(output[len(ids) :], skip_special_tokens=True)])
print(json.dumps(found))
"""


def conversations() -> list[list[dict[str, str]]]:
    """Twenty conversations of one to three questions and answers."""
    draw, texts, found = random.Random(0), paragraphs(200), []
    for number in range(20):
        found.append(turns := list[dict[str, str]]())
        for turn in range(1 + number % 3):
            question = f"{number}.{turn} {draw.choice(texts)[:25].strip()}"
            answer = draw.choice(texts).split(" ", 1)[1][:30].strip()
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return found


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def questions() -> list[tuple[list[dict[str, str]], str]]:
    """Each answer of the conversations, and what was said before it."""
    return [
        (turns[:number], turn["content"])
        for turns in conversations()
        for number, turn in enumerate(turns)
        if turn["role"] == "assistant"
    ]


def make_recipe(folder: Path) -> Path:
    """A tiny Llama that learns the twenty conversations by heart."""
    texts = [*paragraphs(100), *(turn["content"] for turns in conversations() for turn in turns)]
    tokenizers.train(tokenizers.Tokenizer(vocab_size=400), iter(texts), "gpt").save_pretrained(folder / "tokenizer")
    file = str(write(folder / "chats.jsonl", [{"messages": turns} for turns in conversations()]))
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    content = {
        "model": {
            "class_path": "InstructionLM",
            "init_args": {
                "network": {"model_type": "llama", "max_position_embeddings": 256, **sizes},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 5e-3}},
                "schedule": {"warmup_steps": 5},
            },
        },
        "data": {
            "class_path": "InstructionData",
            "init_args": {
                "tables": {"train": file, "validation": file, "test": file},
                "tokenizer": {"path": str(folder / "tokenizer")},
                "chat_template": "chatml",
                "max_length": 200,
                "batch_size": 10,
            },
        },
        "trainer": {
            "max_steps": 140,
            "val_check_interval": 140,
            "check_val_every_n_epoch": None,
            "log_every_n_steps": 1,
            "accelerator": "cpu",
            "precision": "32-true",
        },
        "runs_dir": str(folder / "runs"),
    }
    recipe = folder / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(content))
    return recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return make_recipe(tmp_path)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Runs that know the conversations by heart, by their chat templates."""
    runs: dict[str, Path] = {}

    def run(template: str) -> Path:
        if template not in runs:
            folder = tmp_path_factory.mktemp("learned")
            result = command("fit", "--config", make_recipe(folder), "--data.chat_template", template)
            assert result.returncode == 0, result.stderr
            (runs[template],) = (folder / "runs" / "tiny").iterdir()
        return runs[template]

    return run


def losses(run: Path, name: str = "train/loss") -> list[float]:
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


BOTH = ["chatml", pytest.param("headings", marks=pytest.mark.slow)]  # with generation markers, and without


@pytest.mark.parametrize("template", BOTH)
def test_a_chat_reproduces_learned_conversations_and_stops(
    template: str, learned, cli, monkeypatch: pytest.MonkeyPatch
):
    from lm_lightning.generation import generate

    run = learned(template)
    loaded = generate.load(str(run), "cpu")
    monkeypatch.setattr(generate, "load", lambda *_: loaded)
    for turns in conversations():
        said = [turn["content"] for turn in turns if turn["role"] == "user"]
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*said, "", ""])))
        out = cli("generate", run, "--chat", "true", "--greedy", "true", "--max_new_tokens", 60)
        expected = [turn["content"] for turn in turns if turn["role"] == "assistant"]
        assert out.split("> ") == ["", *(f"{answer}\n" for answer in expected), ""]


def test_a_chat_has_the_system_message_and_ends_answers_whatever_the_generation_config_says(
    learned, cli, monkeypatch: pytest.MonkeyPatch
):
    from lm_lightning.generation import generate

    network, tokenizer = generate.load(str(learned("chatml")), "cpu")
    network.generation_config.eos_token_id = tokenizer.eos_token_id
    prompts, stream = [], generate.stream
    monkeypatch.setattr(generate, "load", lambda *_: (network, tokenizer))
    monkeypatch.setattr(generate, "stream", lambda *args: prompts.append(args[2]) or stream(*args))
    turns = conversations()[0]
    for system in ("", "Be <|im_end|>brief."):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{turns[0]['content']}\n\n"))
        flags = ("--chat", "true", "--greedy", "true", "--max_new_tokens", 60)
        out = cli("generate", "RUN", *flags, *(("--system", system) if system else ()))
        said = [{"role": "system", "content": system}] if system else []
        assert prompts[-1] == ChatFormat(tokenizer).prompt([*said, turns[0]])
        assert system or out == f"> {turns[1]['content']}\n> "


@pytest.mark.parametrize("template", BOTH)
def test_plain_transformers_reads_the_same_and_answers_the_same(template: str, learned):
    run = learned(template)
    asked = [before for before, _ in questions()]
    result = subprocess.run(
        [python("transformers"), "-c", SCRIPT, run / "model"], input=json.dumps(asked), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    chat = ChatFormat(tokenizers.load(str(run)))
    assert json.loads(result.stdout.splitlines()[-1]) == [
        [chat.prompt(before), answer] for before, answer in questions()
    ]


def test_predictions_are_the_answers_and_are_scored(learned, cli, tmp_path: Path):
    run = learned("chatml")
    rows = [{"messages": before} for before, _ in questions()]
    cli("predict", run, "--data.tables.predict", write(tmp_path / "asked.jsonl", rows), "--data.batch_size", 8)
    lines = (evaluation(run) / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in lines] == [answer for _, answer in questions()]
    cli("test", run, "--model.evaluation.scores", "[ExactMatch]", "--model.evaluation.batch_size", 7)
    metrics = json.loads((evaluation(run, "test") / "evaluation.json").read_text())["metrics"]
    assert metrics["test/exact_match"] == 1 and metrics["test/loss"] < 0.1


def surprising() -> list[list[dict[str, str]]]:
    """The conversations with other answers, which have a high loss."""
    return [[{**turn, "content": turn["content"][::-1]} for turn in turns] for turns in conversations()]


@pytest.fixture
def logged(learned, cli, tmp_path: Path) -> float:
    """The mean loss of the surprising conversations, which an evaluation of the run with `chatml` logs."""
    run = learned("chatml")
    file = write(tmp_path / "surprising.jsonl", [{"messages": turns} for turns in surprising()])
    out = cli("validate", run, "--data.max_length", 256, "--data.tables.validation", file)
    assert "not used" not in out
    return json.loads((evaluation(run, "validate") / "evaluation.json").read_text())["metrics"]["val/loss"]


def test_loss_is_that_of_trl(learned, logged: float, tmp_path: Path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model = learned("chatml") / "model"
    options = {"assistant_only_loss": True, "max_length": None, "per_device_train_batch_size": 20, "bf16": False}
    trainer = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        trl.SFTConfig(str(tmp_path), report_to="none", use_cpu=True, **options),
        train_dataset=datasets.Dataset.from_list([{"messages": turns} for turns in surprising()]),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    (batch,) = trainer.get_train_dataloader()
    assert trainer.compute_loss(trainer.model.eval(), batch).item() == pytest.approx(logged, rel=1e-5)
    assert logged > 3


def test_loss_is_that_of_the_answers_in_plain_transformers(learned, logged: float):
    run = learned("chatml")
    network = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    total, count = 0.0, 0
    for turns in surprising():
        encoded = tokenizer.apply_chat_template(
            turns, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        ids, answers = encoded["input_ids"], torch.as_tensor(encoded["assistant_masks"]).view(1, -1).bool()
        with torch.no_grad():
            loss = network(input_ids=ids, labels=ids.masked_fill(~answers, -100)).loss
        total, count = total + loss.item() * int(answers.sum()), count + int(answers.sum())
    assert logged == pytest.approx(total / count, rel=1e-5)
    assert logged > 3


@pytest.mark.slow
def test_packed_batches_have_the_same_loss_and_gradients(cli, fit, recipe: Path):
    packed = ("--data.pack", "true", "--data.max_length", 128)
    out = cli("prepare", "--config", recipe, *packed)
    number = int(out.split("train: ")[2].split()[0])
    assert f"train: {number} rows of 128 tokens" in out and 5 < number < 15
    steps = (
        "--model.schedule.warmup_steps",
        1,
        "--trainer.max_steps",
        3,
        "--trainer.val_check_interval",
        3,
        "--trainer.gradient_clip_val",
        1,
    )
    alone, packs = fit(*steps, "--data.batch_size", 20), fit(*steps, *packed, "--data.batch_size", number)
    for name in ("train/loss", "train/gradient_norm", "val/loss"):
        assert losses(packs, name) == pytest.approx(losses(alone, name), rel=1e-4)
    assert losses(packs)[0] == pytest.approx(losses(alone)[0], abs=1e-5)


def test_packs_are_full_and_have_each_conversation_once(tmp_path: Path):
    lengths = np.random.default_rng(0).integers(1, 50, 1000)
    packs = pack(lengths, 100)
    assert sorted(sample for samples in packs for sample in samples) == list(range(1000))
    fill = [int(lengths[samples].sum()) for samples in packs]
    assert max(fill) <= 100 and len(packs) <= 1.02 * lengths.sum() / 100 + 1
    with StoreWriter(tmp_path, vocabulary=8) as writer:
        writer.add([{"tokens": [1, 2, 3, 4], "is_target": torch.tensor([False, True, False, True])}])
        writer.add([{"tokens": [5, 6, 7], "is_target": torch.tensor([False, False, True])}])
        writer.finish({})
    (row,) = Packs(TokenizedConversations(Store(tmp_path)), 7, 0)
    assert row["input_ids"].tolist() == [1, 2, 3, 5, 6, 0, 0]
    assert row["position_ids"].tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert row["targets"].tolist() == [2, -100, 4, -100, 7, -100, -100]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.slow
def test_a_run_resumes_bit_for_bit(packed: bool, fit, cli, recipe: Path):
    flags = ("--trainer.max_steps", 6, "--trainer.val_check_interval", 2, "--data.batch_size", 3, "--data.pack", packed)
    flags += ("--trainer.accumulate_grad_batches", 2, "--model.schedule.shape", "constant")
    flags += ("--model.schedule.warmup_steps", 1)
    straight = fit(*flags)
    stopped = fit(*flags, "--trainer.max_steps", 4)
    cli("fit", "--config", stopped / "config.yaml", "--ckpt_path", "last", "--trainer.max_steps", 6)
    ends = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (straight, stopped)]
    assert ends[0]["global_step"] == ends[1]["global_step"] == 6
    assert all(torch.equal(tensor, ends[1]["state_dict"][name]) for name, tensor in ends[0]["state_dict"].items())
    assert losses(straight) == losses(stopped)


def test_rows_without_targets_are_counted_and_refused_if_no_other_is_left(cli, fit, refused, recipe: Path):
    file = recipe.with_name("some.jsonl")
    turns = conversations()[2]
    rows = [
        turns,
        turns[:1],
        [turns[0], {**turns[1], "content": " "}],
        [{**turns[0], "content": "why " * 300}, turns[1]],
        turns[1:2],
    ]
    write(file, [{"messages": row} for row in rows])
    out = cli("prepare", "--config", recipe, "--data.tables.train", file, "--show", 0)
    assert "train: 1 conversations" in out
    assert (
        f"not used: 3 have no answer (such as {file}:2) and 1 are longer than data.max_length (such as {file}:4)" in out
    )
    shown = out.split("--- sample 0")[1]
    assert [line[2:] for line in shown.splitlines() if line.startswith("> ")] == [
        f"{turn['content']}<|im_end|>" for turn in turns if turn["role"] == "assistant"
    ]
    # turns are kept whole
    out = cli("prepare", "--config", recipe, "--data.tables.train", file, "--data.max_length", 80, "--show", 0)
    assert "1 answers are not used" in out and out.count("> ") == 2 and out.rstrip().endswith("<|im_end|>")
    message = refused("fit", "--config", recipe, "--data.max_length", 8)
    assert "of its 20 rows 20 are longer than data.max_length" in message


def test_formats_of_published_data_sets_give_the_same_conversation(tmp_path: Path):
    turns = [{"role": "user", "content": "Who?\n\nThe girl."}, {"role": "assistant", "content": "Nobody."}]
    columns = ConversationColumns()
    shared = [{"from": "human", "value": turns[0]["content"]}, {"from": "gpt", "value": "Nobody."}]
    rows: list[dict] = [
        {"messages": turns},
        {"conversations": shared, "id": 7},
        {"messages": json.dumps(turns)},
        {"instruction": "Who?", "input": "The girl.", "output": "Nobody."},
        {"prompt": turns[0]["content"], "completion": "Nobody."},
        {"prompt": turns[:1], "completion": turns[1:]},
        {"conversation": [{**turn, "tool_calls": None} for turn in turns]},
    ]
    for row in rows:
        assert conversation(Row(row, "a:1"), columns) == turns
    system = {"role": "system", "content": "Be brief."}
    assert conversation(Row({"conversations": shared, "system": "Be brief."}, "a:1"), columns) == [system, *turns]
    filled = ConversationColumns(prompt="{{ q }}\n\n{{ c }}", completion="{{ a[0] }}", system="Be {{ how }}.")
    row = {"q": "Who?", "c": "The girl.", "a": ["Nobody."], "how": "brief"}
    assert conversation(Row(row, "a:1"), filled) == [system, *turns]
    for wrong, message in (
        ({"text": "a"}, "the columns text are no conversation"),
        ({"messages": "Hello"}, "must be a list of turns"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "has the role 'wizard'"),
        ({"messages": [{"role": "user", "content": 7}]}, "has the content 7"),
    ):
        with pytest.raises(UserError, match=f"a:1: .*{message}"):
            conversation(Row(wrong, "a:1"), columns)
    with pytest.raises(UserError, match="a:1: --data.columns.prompt .*'c' is undefined"):
        conversation(Row({"q": "Who?", "how": ""}, "a:1"), filled)


def test_parquet_prompts_without_a_chat_template_are_followed_by_their_completions(cli, recipe: Path):
    import pyarrow
    import pyarrow.parquet

    file = recipe.with_name("pairs.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"de": ["Nacht", "Tag"], "en": ["night", "day<|endoftext|>"]}), file)
    template = ("--data.columns.prompt", "{{ de }} is ", "--data.columns.completion", "{{ en }}")
    flags = ("--data.tables.train", file, "--data.tables.validation", file, "--data.chat_template", "plain")
    out = cli("prepare", "--config", recipe, *flags, *template, "--show", 0, 1)
    assert out.split("--- sample 0\n")[1] == (
        "  Nacht is \n> night<|endoftext|>\n--- sample 1\n  Tag is \n> day<|endoftext|><|endoftext|>\n"
    )


@pytest.fixture
def pretrained(finished: Path) -> tuple:
    """Flags for a network that was pretrained with this project."""
    return ("--model.pretrained", finished, "--trainer.accelerator", "cpu", "--data.max_length", 64)


@needs("lora")
@pytest.mark.parametrize(
    ("name", "template"), [("chat", "chatml"), pytest.param("chat_lora", "headings", marks=pytest.mark.slow)]
)
def test_recipe_trains_and_exports(name: str, template: str, cli, tmp_path: Path, pretrained: tuple):
    file = write(tmp_path / "chats.jsonl", [{"messages": turns[:2]} for turns in conversations()])
    out = cli(
        *("fit", "--config", ROOT / "configs" / f"{name}.yaml", *pretrained, "--data.tables.train", file),
        *("--data.chat_template", template, "--runs_dir", tmp_path, "--trainer.max_epochs", 1),
        *("--data.tables.validation_fraction", 0.3, "--trainer.log_every_n_steps", 1, "--model.max_new_tokens", 5),
        *("--model.evaluation.scores", "[ExactMatch]", "--best.monitor", "val/exact_match"),
    )
    run = Path(out.split("run folder: ")[1].splitlines()[0])
    assert losses(run, "val/exact_match") and "val/exact_match 0" in out
    sample = json.loads((run / "samples.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert sample["reference"] in [answer for _, answer in questions()] and sample["text"] is not None
    assert losses(run) and all(np.isfinite(losses(run) + losses(run, "val/loss")))
    tokenizer, network = (kind.from_pretrained(run / "model") for kind in (AutoTokenizer, AutoModelForCausalLM))
    assert tokenizer.chat_template == TEMPLATES[template]
    assert network.generation_config.eos_token_id[0] == ChatFormat(tokenizer).end_id
    cli("validate", run)


@needs("lora")
def test_new_tokens_are_refused_where_their_embeddings_would_not_be_trained(refused, recipe: Path, pretrained: tuple):
    flags = ("--config", ROOT / "configs" / "chat_lora.yaml", *pretrained)
    file = ("--data.tables.train", recipe.with_name("chats.jsonl"))
    assert "model.adapter would not train" in refused("fit", *flags, *file, "--data.chat_template", "chatml")
    message = refused("fit", *flags, *file)
    assert "more than a prompt and a completion need a chat template" in message
