"""Every command in the README's code blocks is run as it stands, in order, on a user's own files in a fresh folder.

What differs from the README: placeholders such as RUN stand for what the commands before have left, and the recipes in
the folder's copy of `configs/` are smaller (`shrink`).
"""

import csv
import json
import math
import random
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from clauses import sentences
from conftest import ROOT, command, paragraphs
from test_configs import SMALL
from transformers import AutoConfig, AutoModelForMaskedLM

from lm_lightning.data.tokenizer import Tokenizer, train

NOT_RUN = {  # what a command begins with, and why it is not run
    "pip install": "the packages are installed",
    "pytest": "that is what runs this",
    "torchrun": "needs a second machine (test_fit.py has torchrun on one)",
    "sbatch": "needs SLURM (test_survival.py plays it)",
}
BASE = re.compile(r"FOLDER(_HUB_NAME_OR_RUN|_OR_HUB_NAME)?$")
RUN = re.compile(r"(runs/\w+/)?(RUN(_OR_MODEL)?|\d{4}-\d\d-\d\d_[\d-]+)$")


def commands() -> dict[str, list[list[str]]]:
    """The words of all commands in code blocks, by the heading that they are under."""
    found: dict[str, list[list[str]]] = {}
    heading, block = "", False
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if line.startswith("```"):
            block = not block
        elif not block and line.startswith("#"):
            heading = line.lstrip("# ")
        elif block and line.startswith(("python -m lm_lightning", *NOT_RUN)):
            found.setdefault(heading, []).extend(shlex.split(part) for part in line.split("&&"))
    return found


COMMANDS = commands()
TABLE = re.search(r"^\| recipe \|.*?\n\n", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
LABELLED = sorted(set(re.findall(r"`(\w+\.yaml)`", TABLE[0]))) if TABLE else []


def shrink(configs: Path, cache_dir: Path, corpus: Path) -> None:
    """Makes the recipes of pretraining those of tiny networks that train six steps on a user's text."""
    for file in configs.glob("*.yaml"):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        model, data, trainer = (
            content["model"]["init_args"],
            content["data"].setdefault("init_args", {}),
            content["trainer"],
        )
        trainer |= {"accelerator": "cpu", "precision": "32-true", "log_every_n_steps": 1}
        if network := model.get("network"):
            model["network"] = network | SMALL[network["model_type"]]
            model |= {"schedule": {"warmup_steps": 1}, "compile": False}
            algorithm = "wordpiece" if content["data"]["class_path"] == "MaskedData" else "bpe"
            data |= {"tokenizer": {"algorithm": algorithm, "vocab_size": 400, "lowercase": algorithm == "wordpiece"}}
            data |= {"block_size": 64, "batch_size": 4, "num_workers": 0, "cache_dir": str(cache_dir)}
            data["corpus"] = {"paths": [str(corpus)], "validation_fraction": 0.1}
            trainer |= {"max_steps": 6, "val_check_interval": 3, "limit_val_batches": 2, "accumulate_grad_batches": 1}
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
    search = yaml.safe_load((configs / "search" / "gpt.yaml").read_text(encoding="utf-8"))
    search |= {"trials": 2, "flags": {"model.optimizer.init_args.lr": search["flags"]["model.optimizer.init_args.lr"]}}
    (configs / "search" / "gpt.yaml").write_text(yaml.safe_dump(search), encoding="utf-8")


def write(name: str, rows: list[dict]) -> None:
    """A table in the current folder."""
    with open(name, "w", newline="", encoding="utf-8") as file:
        if name.endswith(".csv"):
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def labelled(recipe: str, number: int, seed: int) -> list[dict]:
    """Rows as a user of a recipe has them, the columns of what is to be predicted last."""
    draw, texts = random.Random(seed), paragraphs(number, seed)
    if recipe in ("tagging.yaml", "roles.yaml", "parsing.yaml"):
        names = {"tagging.yaml": ["words", "labels"], "roles.yaml": ["words", "frames"]}
        columns = names.get(recipe, ["form", "head", "deprel"])
        return [{name: row[name] for name in columns} for row in sentences(number, seed)]
    if recipe == "questions.yaml":
        words = [text.split() for text in texts]
        answers = [[{"text": w[1], "answer_start": len(w[0]) + 1}] for w in words]
        return [
            {"id": str(i), "context": text, "question": f"Who is in {i}?", "answers": answer}
            for i, (text, answer) in enumerate(zip(texts, answers))
        ]
    if recipe == "search.yaml":
        return [{"text": text, "pair": text[::-1]} for text in texts]
    if recipe in ("similarity.yaml", "embedding.yaml"):
        return [{"text": text, "pair": draw.choice(texts), "label": draw.randint(0, 5)} for text in texts]
    if recipe == "entailment.yaml":
        return [{"text": text, "pair": text[: 20 * (i % 2 + 1)], "label": "yn"[i % 2]} for i, text in enumerate(texts)]
    return [{"review": text, "stars": len(text) % 2 + 1} for text in texts]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained BERT, as it comes from elsewhere."""
    folder = tmp_path_factory.mktemp("base")
    texts = [*paragraphs(100), *(" ".join(row["words"]) for row in sentences(100, 0))]
    tokenizer = train(Tokenizer(algorithm="wordpiece", vocab_size=400, lowercase=True), iter(texts), "bert")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    settings = SMALL["bert"] | {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "intermediate_size": 128,
    }  # whole 4-bit blocks
    settings |= {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **settings)).save_pretrained(folder)
    return folder


class Reader:
    """Somebody who types the README's commands into a shell, one after the other."""

    def __init__(self, run: Callable[..., str], base: Path) -> None:
        self.run, self.base = run, base
        self.fitted: list[Path] = []  # run folders of `fit`
        self.known: dict[str, str] = {}  # other placeholders
        self.more: list[str] = []  # in the place of `...`

    def type(self, words: list[str]) -> str:
        """Runs a command and checks what it has left."""
        if any(" ".join(words).startswith(start) for start in NOT_RUN):
            return ""
        assert words[:3] == ["python", "-m", "lm_lightning"]
        arguments: list[str] = []
        for word in words[3:]:
            if word == "...":
                arguments += self.more
            elif BASE.match(word):
                arguments.append(str(self.base))
            elif RUN.match(word):
                arguments.append(str(self.fitted[-1]))
            else:
                arguments.append(self.known.get(word, word))
        out = self.run(*arguments)
        if arguments[0] == "fit":
            folder = Path(re.search(r"^run folder: (.*)$", out, re.M)[1])  # type: ignore[index]
            self.fitted.append(folder)
            assert self.logged("val/loss") and all(map(math.isfinite, self.logged("val/loss")))
            assert (folder / "model" / "model.safetensors").is_file()
        return out

    def logged(self, metric: str) -> list[float]:
        """What the last run has logged."""
        with open(self.fitted[-1] / "metrics.csv", newline="", encoding="utf-8") as file:
            return [float(row[metric]) for row in csv.DictReader(file) if row.get(metric)]

    def validate(self) -> None:
        """Checks that an evaluation of the last run finds what the run found itself."""
        out = self.run("validate", self.fitted[-1])
        shown = {m[1]: float(m[2]) for m in re.finditer(r"│ +(val/\S+) +│ +([\d.e+-]+) +│", out)}
        assert any(shown["val/loss"] == pytest.approx(loss, rel=1e-4) for loss in self.logged("val/loss")), shown

    def predictions(self) -> list[dict]:
        """The rows of the newest file of them."""
        file = max(Path("runs").rglob("predictions.jsonl"), key=lambda file: file.stat().st_mtime_ns)
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def reader(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Path, cache_dir: Path, corpus_file: Path):
    """A reader in a fresh folder."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copy(corpus_file, tmp_path / "my_novel.txt")
    monkeypatch.chdir(tmp_path)
    shrink(tmp_path / "configs", cache_dir, corpus_file)
    return Reader(cli, base)


def test_every_command_is_run_here_or_has_a_reason_not_to():
    run = {heading for test in globals() if (heading := getattr(globals()[test], "heading", None))}
    for heading, found in COMMANDS.items():
        left = [words for words in found if not any(" ".join(words).startswith(start) for start in NOT_RUN)]
        assert not left or heading in run, heading


def under(heading: str) -> Callable:
    """Marks the test of the commands under a heading."""

    def mark(test: Callable) -> Callable:
        test.heading = heading  # type: ignore[attr-defined]
        return test

    return mark


@under("lm_lightning")
def test_first_command(reader: Reader):
    for words in COMMANDS["lm_lightning"]:
        reader.type(words)
    assert (reader.fitted[-1] / "samples.jsonl").is_file()
    reader.validate()


@under("Your own text")
def test_own_text(reader: Reader):
    outs = [reader.type(words) for words in COMMANDS["Your own text"]]
    assert outs[-1].startswith("It was a dark") and len(outs[-1]) > 20
    reader.validate()
    reader.run("predict", reader.fitted[-1])
    assert all(math.isfinite(row["loss"]) for row in reader.predictions())


@under("BERT")
def test_bert(reader: Reader):
    for words in COMMANDS["BERT"]:
        reader.type(words)
    ((mask,),) = [row["masks"] for row in reader.predictions()]
    assert mask and all(0 < candidate["probability"] < 1 for candidate in mask)
    reader.validate()


@under("Fine-tuning")
@pytest.mark.parametrize("recipe", LABELLED)
def test_fine_tuning(recipe: str, reader: Reader):
    """The sequence of the README for each recipe of its table, with the files of a user of that recipe."""
    ending = "csv" if recipe == "sentiment.yaml" else "jsonl"
    splits = {"train": 48, "dev": 16, "new": 7}
    rows = {name: labelled(recipe, number, seed) for seed, (name, number) in enumerate(splits.items())}
    known = {"questions.yaml": 3, "entailment.yaml": 2, "similarity.yaml": 2, "embedding.yaml": 2}.get(recipe, 1)
    if recipe != "roles.yaml":  # whose frames name the predicates
        rows["new"] = [dict(list(row.items())[:known]) for row in rows["new"]]
    for name in splits:
        write(f"{name}.{ending}", rows[name])
    reader.known = {f"{name}.csv": f"{name}.{ending}" for name in splits}
    reader.known["configs/sentiment.yaml"] = f"configs/{recipe}"
    for words in COMMANDS["Fine-tuning"]:
        columns = [place for place, word in enumerate(words) if word.startswith("--data.columns.")]
        if columns and recipe != "sentiment.yaml":
            words = [word for place, word in enumerate(words) if not {place, place - 1} & set(columns)]
        reader.type(words)
    assert len(reader.predictions()) == sum(len(row.get("frames", [None])) for row in rows["new"])
    reader.validate()


@under("LoRA")
def test_lora(reader: Reader):
    rows = [{"text": row["review"], "label": row["stars"]} for row in labelled("sentiment.yaml", 64, 0)]
    write("train.csv", rows)
    write("new.csv", [{"text": row["text"]} for row in rows[:5]])
    for words in COMMANDS["LoRA"]:
        reader.type(words)
    run = reader.fitted[-1]
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    reader.validate()
    reader.run("predict", run, "--data.tables.predict", "new.csv")
    assert {row["label"] for row in reader.predictions()} <= {"1", "2"} and len(reader.predictions()) == 5


@under("Semantic search")
def test_semantic_search(reader: Reader):
    rows = [{"title": text[:30], "abstract": text} for text in paragraphs(64)]
    write("train.csv", rows)
    texts = [{"title": row["abstract"]} for row in rows[:20]]
    write("texts.jsonl", texts)
    outs = [reader.type(words) for words in COMMANDS["Semantic search"]]
    found = [line.split("\t") if "\t" in line else line.split(maxsplit=2) for line in outs[-1].splitlines()]
    assert len(found) == 10 and {row[-1] for row in found} <= {row["title"] for row in texts}


@pytest.mark.slow
@under("Compression")
def test_compression(reader: Reader):
    columns = ["--data.columns.text", "review", "--data.columns.label", "stars"]
    reader.more = ["--data.tables.train", "train.csv", "--data.tables.validation", "dev.csv", *columns]
    for seed, (name, number) in enumerate({"train": 256, "dev": 32}.items()):
        write(f"{name}.csv", labelled("sentiment.yaml", number, seed))
    fit = ["python", "-m", "lm_lightning", "fit", "--config", "configs/sentiment.yaml"]
    reader.type([*fit, "--model.pretrained", "FOLDER", "..."])
    for words in COMMANDS["Compression"]:
        if words[0] != "python":
            continue
        reader.type(words)
        with open(reader.fitted[-1] / "compressed" / "compression.csv", newline="", encoding="utf-8") as file:
            table = list(csv.DictReader(file))
        assert len(table) > 1


@pytest.mark.slow
@under("Tuning")
def test_tuning(reader: Reader):
    for words in COMMANDS["Tuning"]:
        reader.type(words)
    best = Path("runs") / "gpt-study" / "best.yaml"
    reader.run("fit", "--config", best, "--trainer.max_steps", 6)


@under("W&B")
def test_weights_and_biases(reader: Reader, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    reader.run = in_a_process
    for words in COMMANDS["W&B"]:
        reader.type(words)
    assert list((reader.fitted[-1] / "wandb").glob("offline-run-*/*.wandb"))


@under("Many devices")
def test_many_devices(reader: Reader):
    reader.run = in_a_process
    reader.known["8"] = "2"  # devices
    for words in COMMANDS["Many devices"]:
        reader.type(words)


def in_a_process(*arguments: object) -> str:
    """What a command prints; it must not fail."""
    result = command(*arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout
