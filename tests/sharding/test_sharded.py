"""One flag changes the strategy, and nothing else changes."""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from conftest import ROOT, exists, needs
from processes import Runs

from lm_lightning.checkpoints.loading import load_checkpoint
from lm_lightning.data.tokenizer import Tokenizer, train
from lm_lightning.errors import UserError
from lm_lightning.sharding import checkpoints

FLAGS = {
    "one": (),
    "ddp": ("--trainer.strategy", "ddp", "--data.batch_size", 2),
    "accumulated": ("--trainer.strategy", "ddp", "--data.batch_size", 1, "--trainer.accumulate_grad_batches", 2),
    "fsdp2": ("--trainer.strategy", "fsdp2", "--data.batch_size", 2),
    "folder": (
        *(
            "--trainer.strategy",
            "FSDP2",
            "--trainer.strategy.sharded_checkpoints",
            "true",
        ),
        *("--data.batch_size", 2),
    ),
    "tp": ("--trainer.strategy", "tp"),
    "split": (
        *("--trainer.strategy", "lm_lightning.sharding.strategy.TensorParallel"),
        *("--trainer.strategy.sharded_checkpoints", "true"),
    ),
}
NETWORKS = {
    "gpt2": {
        "model_type": "gpt2",
        **{"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64},
        **{"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
    },
    "qwen3": {
        "model_type": "qwen3",
        **{"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"head_dim": 8, "intermediate_size": 64, "max_position_embeddings": 64},
    },
    "bert": {
        "model_type": "bert",
        **{"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64},
        **{"max_position_embeddings": 64, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0},
    },
    "bart": {
        "model_type": "bart",
        **{"encoder_layers": 1, "decoder_layers": 1, "d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
        **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64, "dropout": 0},
        **{"init_std": 0.2},
    },
    "t5": {"model_type": "t5", "d_model": 32, "d_kv": 16, "num_heads": 2, "d_ff": 64, "num_layers": 1},
}
NETWORKS["chat"] = NETWORKS["gpt2"]


def equal(one: object, other: object) -> bool:
    """Whether two checkpoints, or parts of them, hold the same."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.fixture
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, cache_dir: Path):
    """Writes a recipe of a tiny network of a type and returns the arguments that train it for ten steps."""
    folder = tmp_path_factory.mktemp("recipes")

    def write(network: str, *flags: object) -> tuple:
        masked, pairs = network in ("bert", "pairs"), network == "pairs"  # next sentences, too
        content = {
            "model": {
                "class_path": "MaskedLM" if masked else "CausalLM",
                "init_args": {"network": NETWORKS["bert" if pairs else network], "schedule": {"warmup_steps": 2}},
            },
            "data": {
                "class_path": "MaskedData" if masked else "PretrainingData",
                "init_args": {
                    **{"corpus": {"paths": [str(corpus_file)]}, "tokenizer": {"vocab_size": 300}},
                    **{"block_size": 32, "batch_size": 4, "cache_dir": str(cache_dir)},
                    **({"next_sentence": True} if pairs else {}),
                },
            },
            "trainer": {
                **{"max_steps": 10, "check_val_every_n_epoch": None, "log_every_n_steps": 1},
                **{"accelerator": "cpu", "precision": "32-true", "devices": "auto"},
            },
        }
        if network in ("bart", "t5"):
            content |= encoder_decoder(folder, network)
        if network == "chat":
            content |= chat(folder)
        file = folder / f"{network}.yaml"
        file.write_text(yaml.safe_dump(content))
        return ("fit", "--config", file, *flags)

    return write


def encoder_decoder(folder: Path, network: str) -> dict:
    """The model and the data of a network that writes a text for a text."""
    numbers = [f"{number * number % 997} {number % 7}" for number in range(1, 61)]
    for name, rows in {"x": numbers, "y": [" ".join(reversed(row)) for row in numbers]}.items():
        (folder / f"pairs.{name}").write_text("\n".join(rows), encoding="utf-8")
    files = [str(folder / "pairs.x"), str(folder / "pairs.y")]
    model = {
        **{"network": NETWORKS[network], "schedule": {"warmup_steps": 2}, "label_smoothing": 0.1},
        **{"decoding": {"num_beams": 2, "max_new_tokens": 12}},
        "evaluation": {"scores": [{"class_path": "Chrf"}], "rows": 7, "batch_size": 2},
    }
    parallel = {"train": files, "validation": files}
    data = {"parallel": parallel, "tokenizer": {"vocab_size": 270}, "max_length": 60, "max_target_length": 60}
    return {
        "model": {"class_path": "Seq2Seq", "init_args": model},
        "data": {"class_path": "Seq2SeqData", "init_args": data | {"batch_size": 4}},
    }


def chat(folder: Path) -> dict:
    """The model and the data of a network that is scored by the answers that it writes."""
    rows = [{"prompt": f"the {number} rivers", "completion": "flow"} for number in range(20)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    texts = (" ".join(row.values()) for row in rows)
    train(Tokenizer(vocab_size=270), texts, "gpt").save_pretrained(folder / "tokenizer")
    tables = {"train": str(folder / "chat.jsonl"), "validation_fraction": 0.3}
    scores = {"scores": [{"class_path": "ExactMatch"}]}
    data = {"tables": tables, "tokenizer": {"path": str(folder / "tokenizer")}, "max_length": 60, "batch_size": 4}
    return {
        "model": {"class_path": "InstructionLM", "init_args": {"network": NETWORKS["chat"], "evaluation": scores}},
        "data": {"class_path": "InstructionData", "init_args": data},
    }


def commands(recipe, network: str, names: list[str], *flags: object) -> dict[str, tuple]:
    """Runs of a network, one a strategy, each named `<strategy>_<network>`."""
    result = {}
    for name in names:
        devices = 1 if name == "one" else 2
        own = (*FLAGS[name], "--trainer.val_check_interval", 5, "--trainer.devices", devices)
        result[f"{name}_{network}"] = recipe(network, *own, *flags)
    return result


BERT = needs("tasks.masked_lm")


@pytest.mark.parametrize(
    ("network", "strategies"),
    [
        ("gpt2", ["ddp", "accumulated", "fsdp2", "tp"]),
        pytest.param("pairs", ["ddp", "accumulated", "fsdp2", "tp"], marks=BERT),
        ("qwen3", ["fsdp2", "tp"]),  # (data parallel processes do not look into the network)
    ],
    ids=["gpt2", "pairs", "qwen3"],
)
@pytest.mark.slow
def test_every_strategy_has_the_losses_of_one_process(runs, recipe, network: str, strategies: list[str]):
    writes = exists("tasks.seq2seq") and exists("generation")
    pairs = ["one", "fsdp2", "tp"] if network == "gpt2" and writes else []
    runs(commands(recipe, network, ["one", *strategies]) | commands(recipe, "bart", pairs))
    for name in pairs[1:]:  # encoder-decoders, which also write texts
        assert runs.differ("one_bart", f"{name}_bart", "step", "train/loss") < 1e-5
        assert runs.differ("one_bart", f"{name}_bart", "step", "train/gradient_norm") < 1e-3
        assert runs.differ("one_bart", f"{name}_bart", "step", "val/loss", "val/chrf") < 1e-5
    one = f"one_{network}"
    assert len(runs.log(one, "step", "train/loss")) == 10
    for name in strategies:
        other = f"{name}_{network}"
        # (Qwen's small heads have large gradients at first, which make more of rounding.)
        tolerance = 1e-4 if network == "qwen3" else 1e-5
        assert runs.differ(one, other, "step", "train/loss") < tolerance
        assert runs.differ(one, other, "step", "train/gradient_norm") < 200 * tolerance
        assert runs.differ(one, other, "step", "val/loss") < tolerance


@needs("tasks.tagging")
@pytest.mark.slow
def test_first_step_is_that_of_one_process_whatever_the_lengths(runs, recipe, tmp_path: Path):
    """5 words in one process and 60 in the other: the gradient is that of the mean over all words of both."""
    words = ["anna", "sees", "the", "river", "house"]
    rows = [{"words": words[:1] * n + words[: 5 - n % 5], "labels": ["B-A"] * n + ["O"] * (5 - n % 5)} for n in (1, 56)]
    assert [len(row["words"]) for row in rows] == [5, 60]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = train(Tokenizer(algorithm="wordpiece", vocab_size=60, lowercase=True), iter([" ".join(words)]), "bert")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    content = {
        "model": {
            "class_path": "Tagging",
            "init_args": {
                "network": NETWORKS["bert"] | {"max_position_embeddings": 256},
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0}},
                "schedule": {"shape": "constant", "warmup_steps": 0},
            },
        },
        "data": {
            "class_path": "TaggingData",
            "init_args": {
                "tables": {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation")},
                **{"tokenizer": {"path": str(tmp_path / "tokenizer")}, "max_length": 250, "batch_size": 2},
            },
        },
        "best": {"monitor": "val/loss"},
        "trainer": {
            **{"max_steps": 1, "log_every_n_steps": 1, "accelerator": "cpu", "precision": "32-true", "devices": 2},
        },
    }
    (tmp_path / "unequal.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    fit, each = ("fit", "--config", tmp_path / "unequal.yaml"), ("--data.batch_size", 1)
    runs(
        {
            "one": (*fit, "--trainer.devices", 1),
            "one_accumulated": (*fit, *each, "--trainer.devices", 1, "--trainer.accumulate_grad_batches", 2),
            "ddp": (*fit, *each, "--trainer.strategy", "ddp"),
            "fsdp2": (*fit, *each, "--trainer.strategy", "fsdp2"),
        }
    )
    (expected,) = runs.log("one", "step", "train/loss", "train/gradient_norm")
    assert expected[2] > 0.1
    weights = safetensors.torch.load_file(runs.folder / "one" / "model" / "model.safetensors")
    for name in ("one_accumulated", "ddp", "fsdp2"):
        assert runs.log(name, "step", "train/loss", "train/gradient_norm") == [pytest.approx(expected, rel=1e-5)], name
        own = safetensors.torch.load_file(runs.folder / name / "model" / "model.safetensors")
        assert all(torch.allclose(own[key], weights[key], atol=1e-6) for key in weights), name


@pytest.mark.slow
def test_other_processes_go_on_with_the_same_samples_in_the_same_order(runs, recipe):
    """None is lost, none repeated: one process to two and two to one, by a file and by a folder."""
    note = ("--trainer.callbacks", '[{"class_path": "processes.Order"}]', "--model.schedule.shape", "constant")
    note = (*note, "--trainer.limit_val_batches", 0)
    whole = commands(recipe, "gpt2", ["one"], *note)["one_gpt2"]
    halves = commands(recipe, "gpt2", ["one", "ddp", "folder"], *note, "--trainer.max_steps", 5)
    runs({"one_whole": whole} | {f"{name}_half": command for name, command in halves.items()})

    def order(*names: str) -> list[tuple[int, list[int]]]:
        steps: dict[int, list[int]] = {}
        for name in names:
            for line in (runs.folder / name / "order.jsonl").read_text().splitlines():
                step, samples = json.loads(line)
                steps[step] = steps.get(step, []) + samples
        return sorted((step, sorted(samples)) for step, samples in steps.items())

    resumed = {}
    for state, others in {"one": ["accumulated"], "ddp": ["one"], "folder": ["one"]}.items():
        checkpoint = runs.folder / f"{state}_gpt2_half" / "checkpoints" / "last.ckpt"
        checkpoint = checkpoint.rename(runs.folder / f"{state}.ckpt")
        goes_on = commands(recipe, "gpt2", others, *note, "--ckpt_path", checkpoint)
        resumed |= {f"{name}_from_{state}": command for name, command in goes_on.items()}
    runs(resumed)
    expected = order("one_whole")
    assert len(expected) == 10 and all(len(set(samples)) == 4 for _, samples in expected)
    for name in resumed:
        state = name.rsplit("_")[-1]
        assert order(f"{state}_gpt2_half", name) == expected, name


@pytest.mark.slow
def test_damaged_folder_is_named_and_the_one_before_taken(runs, recipe, cli, tmp_path: Path):
    flags = ("--model.schedule.shape", "constant", "--trainer.limit_val_batches", 0)
    runs(commands(recipe, "gpt2", ["folder"], *flags, "--trainer.max_steps", 4))
    run = tmp_path / "runs" / "cut" / "first"
    shutil.copytree(runs.folder / "folder_gpt2", run)
    last = run / "checkpoints" / "last.ckpt"
    shutil.copytree(last, last.with_name("last.ckpt.old"))  # as a kill leaves it while a new one takes its place
    (part,) = last.glob("__1_*.distcp")
    whole = part.read_bytes()
    for damaged in (whole[:-1], whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]):
        part.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{part.name} is wrong"):
            load_checkpoint(last)
    part.write_bytes(whole)
    expected, draw, found = load_checkpoint(last), random.Random(0), 0
    for file in last.iterdir():
        content = file.read_bytes()
        for place in draw.sample(range(len(content)), 30):
            file.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
            try:
                loaded = load_checkpoint(last)
            except UserError as error:
                assert str(last) in str(error)
                found += 1
            else:  # a bit that means nothing, such as those that align the parts of meta.pt
                assert equal(loaded, expected), file.name
        file.write_bytes(content)
    assert found > 90
    part.unlink()
    arguments = recipe("gpt2", *flags, "--runs_dir", tmp_path / "runs", "--name", "cut", "--trainer.devices", 1)
    out = cli(*arguments, "--ckpt_path", "last")
    assert f"the checksum of its part {part.name} is wrong" in out and "using last.ckpt.old of step 4" in out


@pytest.mark.slow
def test_folder_takes_the_place_of_a_file_and_a_file_that_of_a_folder(runs, recipe, cli, tmp_path: Path):
    flags = ("--model.schedule.shape", "constant", "--trainer.limit_val_batches", 0)
    one = recipe("gpt2", *flags, "--runs_dir", tmp_path, "--trainer.devices", 1)
    cli(*one, "--trainer.max_steps", 3)
    (run,) = (tmp_path / "gpt2").iterdir()
    last = run / "checkpoints" / "last.ckpt"
    (last.parent / "old.ckpt.partial").mkdir()  # as a kill leaves it
    runs(commands(recipe, "gpt2", ["folder"], *flags, "--ckpt_path", last, "--trainer.max_steps", 5))
    assert last.is_dir() and load_checkpoint(last)["global_step"] == 5
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]
    cli(*one, "--ckpt_path", "last", "--trainer.max_steps", 6)
    assert last.is_file() and load_checkpoint(last)["global_step"] == 6
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.slow
def test_disk_that_is_full_leaves_the_folder_before_and_no_part_of_the_next(runs, recipe):
    full = '[{"class_path": "processes.Full", "init_args": {"step": 5}}]'
    flags = ("--trainer.limit_val_batches", 0, "--last.every_n_train_steps", 4, "--trainer.callbacks", full)
    runs(commands(recipe, "gpt2", ["folder"], *flags))
    folder = runs.folder / "folder_gpt2" / "checkpoints"
    error = runs.error("folder_gpt2")
    assert f"{folder / 'last.ckpt'} cannot be written" in error and "it needs more than" in error
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"]
    assert load_checkpoint(folder / "last.ckpt")["global_step"] == 4


@pytest.mark.parametrize("state", ["folder", "fsdp2", "split"])
@pytest.mark.slow
def test_sharded_run_resumes_under_the_same_strategy_in_the_same_bits(runs, recipe, state: str):
    """Dropout and the optimizer's state included."""
    flags = ("--model.schedule.shape", "constant", "--model.network.resid_pdrop=0.1", "--model.network.embd_pdrop=0.1")
    (full,) = commands(recipe, "gpt2", [state], *flags).values()
    runs({f"{state}_full": (*full, "--best.save_top_k", -1, "--best.filename", "best-{step}")})
    checkpoint = runs.folder / f"{state}_full" / "checkpoints" / "best-5.ckpt"
    assert checkpoint.is_dir() == (state != "fsdp2") and load_checkpoint(checkpoint)["global_step"] == 5
    runs({f"{state}_resumed": (*full, "--ckpt_path", checkpoint)})
    columns = ("step", "train/loss", "train/gradient_norm", "train/learning_rate")
    assert runs.log(f"{state}_resumed", *columns) == runs.log(f"{state}_full", *columns)[5:]
    ends = [
        load_checkpoint(runs.folder / f"{state}_{name}" / "checkpoints" / "last.ckpt") for name in ("full", "resumed")
    ]
    assert len(ends[0]["state_dict"]) and ends[0]["global_step"] == 10
    for key in ("state_dict", "optimizer_states"):
        assert equal(ends[0][key], ends[1][key]), key


@pytest.mark.slow
def test_folders_are_not_written_in_the_background(runs, recipe):
    background = ("--trainer.plugins", "BackgroundCheckpoints")
    started = commands(recipe, "gpt2", ["fsdp2", "folder"], *background, "--trainer.max_steps", 5)
    runs(started)
    assert "sharded_checkpoints" in runs.error("folder_gpt2") and "Traceback" not in runs.error("folder_gpt2")
    assert not runs.error("fsdp2_gpt2")
    files = runs.folder / "fsdp2_gpt2" / "checkpoints"
    assert {path.name for path in files.iterdir()} == {"best.ckpt", "last.ckpt"}
    assert all(load_checkpoint(path)["global_step"] == 5 for path in files.iterdir())


@pytest.mark.slow
def test_overlays_of_configs_train(runs, recipe):
    overlays = sorted((ROOT / "configs" / "strategy").glob("*.yaml"))
    runs({f.stem: recipe("gpt2", "--config", f, "--trainer.devices", 2, "--trainer.max_steps", 4) for f in overlays})
    for file in overlays:
        assert len(runs.log(file.stem, "step", "train/loss")) == 4


@pytest.mark.slow
def test_network_that_cannot_be_sharded_is_refused(runs, recipe):
    wrong = {
        "num_attention_heads": ("gpt2", "--model.network.n_head", 1),
        "num_key_value_heads": ("qwen3", "--model.network.num_key_value_heads", 1),
        "type bloom": ("gpt2", "--model.network", '{"model_type": "bloom", "hidden_size": 32, "n_head": 2}'),
    }
    if exists("tasks.seq2seq"):
        wrong |= {"type t5": ("t5",), "decoder_attention_heads": ("bart", "--model.network.decoder_attention_heads", 1)}
    if exists("tasks.instruction"):
        wrong |= {"FSDP2 shards the parameters, with which processes cannot write": ("chat", *FLAGS["fsdp2"])}
    flags = ("--trainer.strategy", "tp", "--trainer.devices", 2)
    runs({reason: recipe(network, *flags, *own) for reason, (network, *own) in wrong.items()})
    for reason in wrong:
        assert reason in runs.error(reason) and "Traceback" not in runs.error(reason)


def test_tampered_table_of_contents_is_not_run(tmp_path: Path):
    """The table of a sharded checkpoint is a pickle; one that would run something is refused."""
    table = tmp_path / ".metadata"
    allowed = checkpoints.METADATA
    for module, name in (
        ("os", "system"),
        ("this", "s"),
        (allowed, "os.system"),
        (allowed, "Sequence"),
        ("torch", "load"),
    ):
        strings = [b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)]
        table.write_bytes(b"\x80\x04" + b"".join(strings) + b"\x93.")  # a pickle of what has that name
        with pytest.raises(UserError, match=f"{name} does not belong"):
            checkpoints.Reader(tmp_path).read_metadata()
    assert "this" not in sys.modules, "an import runs code as well"


@pytest.mark.slow
def test_two_nodes_have_the_losses_of_one_process(runs, recipe):
    """Sharded within each node, and tensor parallel within each node and sharded over the nodes."""
    nodes = ("--trainer.num_nodes", 2, "--trainer.devices", 2, "--trainer.val_check_interval", 3)
    steps = ("--trainer.max_steps", 6)
    one = commands(recipe, "gpt2", ["one"], "--trainer.val_check_interval", 3, *steps)
    several = {
        f"nodes_{name}": recipe("gpt2", *nodes, *steps, "--trainer.strategy", name, "--data.batch_size", batch_size)
        for name, batch_size in {"hsdp": 1, "tp": 2}.items()
    }
    runs(one | several)
    for name in several:
        assert runs.differ("one_gpt2", name, "step", "train/loss") < 1e-5
        assert runs.differ("one_gpt2", name, "step", "train/gradient_norm") < 1e-4
        assert runs.differ("one_gpt2", name, "step", "val/loss") < 1e-5


OPTIONS = {  # with the largest difference of losses
    "exact": (("--data.mask_documents", "true", "--model.activation_checkpointing", 2), 1e-5),  # and accumulation
    "muon": (("--model.optimizer", "lm_lightning.optim.MuonAdamW"), 1e-3),  # its iteration is in bf16
    "bf16": (("--trainer.precision", "bf16-mixed"), 5e-3),
}


@pytest.mark.slow
def test_options_do_under_sharding_what_they_do_without(runs, recipe):
    started = {}
    for option, (flags, _) in OPTIONS.items():
        for strategy in ("one", "fsdp2", "tp"):
            parts = 2 if strategy == "fsdp2" else 4
            accumulated = ("--data.batch_size", 1, "--trainer.accumulate_grad_batches", parts)
            own = (*flags, *accumulated, "--trainer.max_steps", 5) if option == "exact" else flags
            (command,) = commands(recipe, "gpt2", [strategy], *own, "--trainer.limit_val_batches", 0).values()
            started[f"{strategy}_{option}"] = command
    runs(started)
    for option, (_, tolerance) in OPTIONS.items():
        for strategy in ("fsdp2", "tp"):
            assert runs.differ(f"one_{option}", f"{strategy}_{option}", "step", "train/loss") < tolerance, option


@needs("generation")
@pytest.mark.slow
def test_sharded_network_generates_predicts_and_is_exported(runs, recipe, cli):
    callback = '[{"class_path": "lm_lightning.generation.samples.Samples", "init_args": {"prompts": ["", "The old"]}}]'
    names = ["one", "fsdp2", "split"]
    runs(commands(recipe, "gpt2", names, "--trainer.callbacks", callback))
    samples = [(runs.folder / f"{name}_gpt2" / "samples.jsonl").read_text() for name in names]
    assert samples[0].count("\n") == 4 and samples[1] == samples[2] == samples[0]

    checkpoint = runs.folder / "split_gpt2" / "checkpoints" / "last.ckpt"
    assert checkpoint.is_dir()
    predict, predictions = {}, {}
    for name in names:  # each on a copy of the run, since they are written beside the checkpoint
        copy = shutil.copytree(runs.folder / "split_gpt2", runs.folder / f"{name}_copy")
        own = FLAGS[name] or ("--trainer.strategy", "auto")  # else the run's
        flags = recipe("gpt2", *own, "--trainer.devices", 1 if name == "one" else 2)[1:]
        predict[f"{name}_predict"] = ("predict", *flags, "--ckpt_path", copy / "checkpoints" / "last.ckpt")
    runs(predict)
    for name in names:
        assert not runs.error(f"{name}_predict")
        copy = runs.folder / f"{name}_copy"
        (file,) = [*copy.rglob("predictions.jsonl"), *(runs.folder / f"{name}_predict").rglob("predictions.jsonl")]
        predictions[name] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    one = predictions["one"]
    assert [row["id"] for row in one] == list(range(len(one))) and len(one) > 10
    for rows in predictions.values():
        assert [(row["id"], row["tokens"]) for row in rows] == [(row["id"], row["tokens"]) for row in one]
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in one], abs=1e-4)

    one_process = ("--trainer.strategy", "auto", "--trainer.devices", 1)
    validated = cli("validate", *recipe("gpt2")[1:], "--ckpt_path", checkpoint, *one_process)
    (last,) = runs.log("split_gpt2", "step", "val/loss")[-1:]
    shown = float(next(line for line in validated.splitlines() if "val/loss" in line).split("│")[2])
    assert shown == pytest.approx(last[1], abs=1e-4)
    shutil.rmtree(runs.folder / "split_gpt2" / "model")
    cli("export", runs.folder / "split_gpt2", "--max_shard_size", "20KB")
    parts = list((runs.folder / "split_gpt2" / "model").glob("model-*-of-*.safetensors"))
    assert len(parts) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "resumed_by"),
    [
        # Each way of saving is read by one process, and each way of reading gets a file and a folder.
        # (Data parallel processes write and read the files of one.)
        (
            "gpt2",
            {
                **{"ddp": ["fsdp2", "tp"], "fsdp2": ["one"], "tp": ["one"]},
                **{"folder": ["one", "tp"], "split": ["one", "fsdp2"]},
            },
        ),
        pytest.param("bert", {"one": ["fsdp2"], "folder": ["split"]}, marks=BERT),
    ],
    ids=["gpt2", "bert"],
)
def test_checkpoint_of_any_strategy_goes_on_under_any_other(
    runs, recipe, network: str, resumed_by: dict[str, list[str]]
):
    """Saved at step 5 of 10 under each, resumed under each: losses and export are those of a run never stopped."""
    flags = ("--model.schedule.shape", "constant", "--data.batch_size", 4)
    whole = f"one_{network}_whole"
    runs({whole: commands(recipe, network, ["one"], *flags)[f"one_{network}"]})
    halves = commands(recipe, network, [*resumed_by], "--model.schedule.shape", "constant", "--trainer.max_steps", 5)
    runs({f"{name}_half": command for name, command in halves.items()})
    resumed = {}
    for state, others in resumed_by.items():
        checkpoint = runs.folder / f"{state}_{network}_half" / "checkpoints" / "last.ckpt"
        assert checkpoint.is_dir() == (state in ("folder", "split"))
        checkpoint = checkpoint.rename(runs.folder / f"{state}_{network}.ckpt")  # else it goes on in its own folder
        goes_on = commands(recipe, network, others, "--model.schedule.shape", "constant", "--ckpt_path", checkpoint)
        resumed |= {f"{name}_from_{state}": command for name, command in goes_on.items()}
    runs(resumed)
    expected = runs.log(whole, "step", "train/loss")[5:]
    weights = safetensors.torch.load_file(runs.folder / whole / "model" / "model.safetensors")
    for name in resumed:
        logged = runs.log(name, "step", "train/loss")
        assert [step for step, _ in logged] == [step for step, _ in expected], name
        assert max(abs(a[1] - b[1]) for a, b in zip(logged, expected)) < 1e-5, name
        own = safetensors.torch.load_file(runs.folder / name / "model" / "model.safetensors")
        assert own.keys() == weights.keys()
        assert all(torch.allclose(own[key], weights[key], atol=1e-4) for key in weights), name
