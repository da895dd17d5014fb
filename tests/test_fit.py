"""A whole run: `fit` in, a run folder out, and how it goes on."""

import csv
import json
import os
import random
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from conftest import command, needs, paragraphs, refusal
from forks import python
from lightning.pytorch import Callback, LightningModule, Trainer

from lm_lightning.console import printable
from lm_lightning.errors import UserError


class Stop(Callback):
    """Ends a run as a failure would, after some steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("power failure")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def metrics(run: Path) -> list[tuple[str, ...]]:
    """What was logged, without what depends on the clock and the machine."""
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    clock = ("tokens_per_second", "seconds", "mfu", "memory", "epoch")
    names = sorted(name for name in rows[0] if not name.endswith(clock))
    return [tuple(row[name] for name in names) for row in rows]


def losses(run: Path) -> list[float]:
    """The loss of each of the ten steps of the tiny recipe."""
    with open(run / "metrics.csv", newline="") as file:
        found = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert len(found) == 10
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_run_folder_is_complete_and_loads_in_plain_transformers(recipe: Path, tmp_path: Path):
    result = command("fit", "--config", recipe, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (run,) = (tmp_path / "runs" / "tiny").iterdir()
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.yaml", "data.json", "environment.json", "tokenizer", "checkpoints", "metrics.csv"}
    assert names >= {"model", "tensorboard"}

    text = "The old captain watched"
    script = (
        "import json, sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = tokenizer(sys.argv[2], return_tensors='pt')\n"
        "print(json.dumps([ids['input_ids'].tolist(), model(**ids).logits.tolist(), len(tokenizer)]))\n"
    )
    loaded = subprocess.run([python("transformers"), "-c", script, run / "model", text], capture_output=True, text=True)
    ids, logits, vocabulary = json.loads(loaded.stdout)

    from transformers import GPT2Config, GPT2LMHeadModel

    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    rows = checkpoint["network"]["rows"]
    network = GPT2LMHeadModel(GPT2Config.from_dict(checkpoint["network"]["config"] | {"vocab_size": rows})).eval()
    network.load_state_dict({k.removeprefix("network."): v for k, v in checkpoint["state_dict"].items()})
    own = network(torch.tensor(ids)).logits[..., :vocabulary]
    assert network.config.vocab_size % 64 == 0 and network.config.vocab_size > vocabulary == len(logits[0][0])
    assert torch.allclose(own, torch.tensor(logits), atol=1e-5)


def test_run_without_checkpoints_leaves_numbers_only(fit):
    run = fit("--trainer.enable_checkpointing", "false")
    assert not (run / "checkpoints").exists() and not (run / "model").exists()
    with open(run / "metrics.csv", newline="") as file:
        memory = [float(row["train/memory"]) for row in csv.DictReader(file) if row["train/memory"]]
    # of a process that has PyTorch and a tiny network in it, in GiB
    assert len(memory) == 10 and memory == sorted(memory) and 0.1 < memory[0] < 10


@pytest.mark.slow
def test_same_command_twice_makes_two_run_folders_with_the_same_weights(fit, reference):
    first, second = reference(), fit()
    assert first != second
    assert same(weights(first), weights(second))


def test_config_of_the_run_folder_runs_the_run_again(reference, cli, tmp_path: Path):
    run = reference()
    out = cli("fit", "--config", run / "config.yaml", "--name", "again", "--runs_dir", tmp_path)
    again = Path(out.split("run folder: ")[1].splitlines()[0])
    assert again.parent.name == "again"
    assert same(weights(run), weights(again))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("flags", [(), ("--trainer.accumulate_grad_batches", 2)], ids=["plain", "accumulated"])
def test_resumed_run_ends_in_the_same_bits_as_one_never_stopped(fit, reference, recipe, workers: int, flags: tuple):
    flags = ("--data.num_workers", workers, *flags)
    whole = reference(*flags[2:])  # the number of workers changes nothing
    # stopped by an exception after step 7: what is left is the checkpoint of step 5
    stop = ["--trainer.callbacks", '[{"class_path": "test_fit.Stop", "init_args": {"step": 7}}]']
    with pytest.raises(RuntimeError, match="power failure"):
        fit("--name", "cut", *flags, *stop)
    (cut,) = (recipe.parent / "runs" / "cut").iterdir()
    assert torch.load(cut / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 5
    assert fit("--name", "cut", "--ckpt_path", "last", *flags) == cut
    assert same(weights(whole), weights(cut))
    assert metrics(whole) == metrics(cut)


@pytest.mark.slow
def test_run_that_was_finished_goes_on_with_more_steps(fit, reference):
    whole = reference("--model.schedule.shape", "constant")
    flags = ("--name", "part", "--model.schedule.shape", "constant")
    part = fit(*flags, "--trainer.max_steps", 7)
    assert fit(*flags, "--ckpt_path", "last") == part
    assert same(weights(whole), weights(part))


def test_refused_resume_leaves_the_run_as_it_is(fit, reference):
    run = reference()
    before = {name: (run / name).read_bytes() for name in ("metrics.csv", "config.yaml")}
    with pytest.raises(UserError, match="raise trainer.max_steps"):
        fit("--ckpt_path", "last", "--runs_dir", run.parent.parent)
    assert {name: (run / name).read_bytes() for name in before} == before
    assert not list(run.glob("config.*.yaml"))


@pytest.mark.slow
def test_torchrun_makes_one_run_folder_with_the_losses_of_one_process(reference, recipe: Path):
    launcher = [python("lm_lightning"), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--data.batch_size", "2"]
    off = [f"--model.network.{name}_pdrop=0" for name in ("resid", "embd", "attn")]
    result = subprocess.run(
        [*launcher, "-m", "lm_lightning", "fit", "--config", recipe, *flags, *off],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("run folder: ") == 1 and "device: cpu x 2" in result.stdout
    (run,) = (recipe.parent / "runs" / "tiny").iterdir()
    assert (run / "model" / "model.safetensors").is_file()
    assert losses(run) == pytest.approx(losses(reference(*off)), abs=1e-5)


@pytest.mark.slow
def test_spawned_processes_do_what_one_does(reference, recipe: Path):
    off = [f"--model.network.{name}_pdrop=0" for name in ("resid", "embd", "attn")]
    one = reference(*off)
    flags = ["--trainer.strategy", "ddp_spawn", "--trainer.devices", 2, "--data.batch_size", 2, "--name", "spawned"]
    result = command("fit", "--config", recipe, *off, *flags)
    assert result.returncode == 0, result.stderr
    (run,) = (recipe.parent / "runs" / "spawned").iterdir()
    assert losses(run) == pytest.approx(losses(one), abs=1e-5)
    ours, theirs = weights(one), weights(run)
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-3) for key in ours)


@pytest.mark.slow
def test_srun_makes_one_run_folder_and_says_everything_once(recipe: Path):
    """Two processes as SLURM starts them, of a job that was requeued once."""
    number = random.SystemRandom().randint(1000, 9999)  # of which a port is made; `random` gives the same after a fit
    job = {"SLURM_JOB_ID": str(number), "SLURM_STEP_ID": "0", "SLURM_RESTART_COUNT": "1"}
    job |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NODEID": "0", "SLURM_JOB_NAME": "training"}
    flags = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--data.batch_size", "2"]

    def start(*more: str) -> list[subprocess.CompletedProcess]:
        with ThreadPoolExecutor() as pool:
            ranks = [os.environ | job | {"SLURM_PROCID": r, "SLURM_LOCALID": r} for r in ("0", "1")]
            return list(pool.map(lambda env: command("fit", "--config", recipe, *flags, *more, env=env), ranks))

    first, second = start()
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    (run,) = (recipe.parent / "runs" / "tiny").iterdir()
    assert run.name == f"slurm-{job['SLURM_JOB_ID']}-0-1" and (run / "model" / "model.safetensors").is_file()
    assert f"run folder: {run}" in first.stdout and "run folder" not in second.stdout
    first, second = start("--data.block_size", "0")
    assert "block_size is 0" in refusal(first)
    assert second.returncode != 0 and "Traceback" not in second.stderr


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--data.batch_size", 0), "data.batch_size is 0"),
        (("--data.block_size", -4), "data.block_size is -4"),
        (("--trainer.accumulate_grad_batches", 0), "accumulate_grad_batches is 0"),
        (("--trainer.gradient_clip_val", -1), "gradient_clip_val is -1"),
        (("--trainer.max_steps", 0), "max_steps is 0"),
        (("--seed_everything", -1), "seed_everything"),
        (("--runs_dir", "/proc/nowhere"), "cannot create the run folder"),
        (("--data.cache_dir", "/proc/nowhere"), "cannot create the cache"),
        (("--name", "../up"), "without slashes"),
        (("--model.network", "null"), "give either model.network"),
        (("--model.network.n_embd", 33), "cannot be created"),
        (("--model.network", "{model_type: t5}"), "transformers has no AutoModelForCausalLM with a T5Config: choose"),
        (("--model.attn_implementation", "banana"), "cannot be created"),
        (("--model.optimizer.init_args.lr", -1), "does not accept its settings"),
        (("--trainer.strategy", "fsdp"), "superseded by its second: use --trainer.strategy"),
        (("--trainer.strategy", "deepspeed_stage_3"), "does not expose its gradients"),
        (("--trainer.strategy", "banana"), "there is no strategy banana"),
        (("--model.activation_checkpointing", -1), "activation_checkpointing is -1"),
        (("--trainer.accelerator", "tpu"), "torch_xla"),
        (("--ckpt_path", "/tmp"), "no checkpoint file"),
    ],
)
def test_mistakes_are_refused_in_one_sentence(fit, flags: tuple, reason: str):
    with pytest.raises(UserError) as refused:
        fit(*flags)
    assert reason.lower() in str(refused.value).lower() and "\n" not in str(refused.value)


def test_changed_flags_of_a_resumed_run_are_honoured(fit):
    run = fit("--trainer.max_steps", 5, "--model.schedule.shape", "constant")
    flags = ("--ckpt_path", "last", "--model.schedule.shape", "constant")
    fit(*flags, "--model.optimizer.init_args.lr", 5e-3, "--model.optimizer.init_args.weight_decay", 0.3)
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    groups = state["optimizer_states"][0]["param_groups"]
    assert {group["lr"] for group in groups} == {5e-3}
    assert sorted({group["weight_decay"] for group in groups}) == [0.0, 0.3]
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    rates = {int(row["step"]): float(row["train/learning_rate"]) for row in rows if row["train/learning_rate"]}
    assert rates[5] == pytest.approx(1e-2) and rates[6] == pytest.approx(5e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--model.network.n_layer", 3), "n_layer 2 (here 3)"),
        (("--data.block_size", 16), "data.block_size 32, but this run has 16"),
        (("--data.tokenizer.vocab_size", 310), "vocab_size 300 (here 310)"),
        (("--seed_everything", 7), "seed_everything 1, but this run has 7"),
        (("--trainer.max_steps", 5), "raise trainer.max_steps"),
        (("--model.optimizer", "lm_lightning.optim.MuonAdamW"), "optimizer"),
    ],
)
def test_changed_flags_that_make_no_sense_on_resuming_are_refused(fit, reference, flags: tuple, reason: str):
    runs = reference("--trainer.max_steps", 5).parent.parent
    with pytest.raises(UserError) as refused:
        fit("--runs_dir", runs, "--ckpt_path", "last", *flags)
    assert reason in str(refused.value)


def test_validating_a_checkpoint_with_other_sizes_names_the_mismatch(reference, cli, recipe):
    checkpoint = reference() / "checkpoints" / "best.ckpt"
    assert "val/perplexity" in cli("validate", "--config", recipe, "--ckpt_path", checkpoint)
    with pytest.raises(UserError, match=r"n_embd 32 \(here 64\)"):
        cli("validate", "--config", recipe, "--ckpt_path", checkpoint, "--model.network.n_embd", 64)


@needs("generation")
@pytest.mark.slow
def test_samples_are_printed_and_saved_and_padding_of_short_prompts_changes_nothing(cli, recipe: Path):
    def samples(*prompts: str) -> tuple[list[dict], str]:
        name = "lm_lightning.generation.samples.Samples"
        callback = {"class_path": name, "init_args": {"prompts": prompts, "sampling": {"temperature": 1.2}}}
        out = cli("fit", "--config", recipe, "--trainer.callbacks", json.dumps([callback]))
        run = Path(out.split("run folder: ")[1].splitlines()[0])
        return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()], out

    rows, printed = samples("7", "The old captain", "The old")
    expected = [(step, prompt) for step in (5, 10) for prompt in ("7", "The old captain", "The old")]
    assert [(row["step"], row["prompt"]) for row in rows] == expected
    assert all(f"sample: {printable(row['prompt'])}|{printable(row['text'])}" in printed for row in rows)
    assert not any("<|" in row["text"] for row in rows)
    assert samples("7")[0] == [row for row in rows if row["prompt"] == "7"]  # the shortest one, without the others


@needs("generation")
@pytest.mark.slow
def test_end_of_text_is_learned_although_it_is_also_the_padding(fit, cli, tmp_path: Path):
    lines = ["apples are red", "the sky is blue", "grass grows green", "coal lies black", "lemons look yellow"]
    # the same lines are all that there is to validate, too: two files, so that none is left out
    for name in ("train.txt", "validation.txt"):
        (tmp_path / name).write_text("\n".join(lines * (40 if name == "train.txt" else 4)) + "\n")
    run = fit(
        *("--data.corpus.paths", [str(tmp_path / "train.txt")], "--data.corpus.document", "line"),
        *("--data.corpus.validation_paths", [str(tmp_path / "validation.txt")]),
        *("--data.corpus.test_fraction", 0, "--data.block_size", 16, "--data.batch_size", 8),
        *("--data.mask_documents", "true", "--trainer.max_steps", 150, "--trainer.val_check_interval", 150),
    )
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(line.split()[0] for line in lines))
    out = cli("generate", run, "--prompts_file", prompts, "--greedy", "true", "--max_new_tokens", 30)
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["prompt"] + answer["text"] for answer in answers] == lines


class Batches(Callback):
    """Keeps which samples each step of the last run has had."""

    steps: ClassVar[list[list[int]]] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: dict, index: int) -> None:
        if index == 0:
            Batches.steps.clear()
        Batches.steps.append([*batch["id"]])


def test_loss_that_is_not_finite_stops_the_run_and_names_step_and_samples(fit):
    # a learning rate out of all proportion makes the weights, then the loss infinite
    flags = ("--model.optimizer.init_args.lr", 1e30, "--model.schedule.warmup_steps", 0)
    flags = (*flags, "--trainer.gradient_clip_val", 0, "--trainer.limit_val_batches", 0)
    with pytest.raises(UserError, match="not finite at step") as stopped:
        fit(*flags, "--trainer.callbacks", '["test_fit.Batches"]')
    step, samples = re.search(r"at step (\d+), on the training samples (\[.*?\]): lower", str(stopped.value)).groups()
    assert json.loads(samples) == sorted(Batches.steps[int(step) - 1])


class TestRefusals:
    """Mistakes that users make: each gets one sentence."""

    def test_wrong_key_in_the_yaml(self, recipe: Path):
        recipe.write_text(recipe.read_text().replace("batch_size", "batchsize"))
        assert "batchsize" in refusal(command("fit", "--config", recipe))

    def test_wrong_key_of_the_network(self, refused, recipe: Path):
        message = refused("fit", "--config", recipe, "--model.network.n_layers", 3)
        assert "n_layers" in message and "n_layer" in message

    def test_missing_config_file(self, refused, tmp_path: Path):
        assert "nowhere.yaml" in refused("fit", "--config", tmp_path / "nowhere.yaml")

    def test_missing_text_file(self, refused, recipe: Path):
        assert "nowhere.txt" in refused("fit", "--config", recipe, "--data.corpus.paths", "[nowhere.txt]")

    def test_empty_text_file(self, refused, recipe: Path, tmp_path: Path):
        (tmp_path / "empty.txt").touch()
        message = refused("fit", "--config", recipe, "--data.corpus.paths", f"[{tmp_path}/empty.txt]")
        assert "no text" in message

    def test_line_of_100000_characters(self, refused, recipe: Path, tmp_path: Path):
        (tmp_path / "long.txt").write_text("a short line\n" + "long " * 20_000 + "\n")
        message = refused("fit", "--config", recipe, "--data.corpus.paths", f"[{tmp_path}/long.txt]")
        assert "long.txt:2" in message and "100000" in message and "max_line" in message

    def test_corpus_without_a_block_to_validate(self, refused, recipe: Path, tmp_path: Path):
        (tmp_path / "few.txt").write_text("\n\n".join(paragraphs(60)))
        flags = ("--data.corpus.paths", f"[{tmp_path}/few.txt]", "--data.corpus.validation_fraction", 0)
        assert "validation split has 0 documents" in refused("fit", "--config", recipe, *flags)

    def test_block_longer_than_the_context(self, refused, recipe: Path):
        assert "positions for 64 tokens" in refused("fit", "--config", recipe, "--data.block_size", 128)

    def test_checkpoint_cut_in_half(self, refused, fit, recipe: Path):
        checkpoint = fit() / "checkpoints" / "last.ckpt"
        checkpoint.write_bytes(checkpoint.read_bytes()[: checkpoint.stat().st_size // 2])
        checkpoint.with_name("best.ckpt").unlink()
        for ckpt_path in ("last", checkpoint):
            message = refused("fit", "--config", recipe, "--ckpt_path", ckpt_path)
            assert str(checkpoint) in message and "cut short" in message

    def test_nothing_to_resume(self, refused, recipe: Path):
        message = refused("fit", "--config", recipe, "--ckpt_path", "last")
        assert "no checkpoint to resume from" in message

    def test_unknown_command(self):
        assert "no command trian" in refusal(command("trian"))
