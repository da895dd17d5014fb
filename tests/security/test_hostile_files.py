"""Thousands of damaged or forged files: each is read, or refused in one sentence.

Reading runs no code, starts no process, writes nothing outside of its folder and does not hang. The mutations are
seeded; a failure names its number, and `mutate(..., number)` makes the same file again.
"""

import contextlib
import io
import json
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import needs

from lm_lightning.checkpoints import sharded as sharded_checkpoint
from lm_lightning.checkpoints.loading import load_checkpoint
from lm_lightning.commands import export
from lm_lightning.data import shards, tokenizer
from lm_lightning.data.corpus import Corpus
from lm_lightning.data.tokenizer import Tokenizer
from lm_lightning.errors import UserError

HOSTILE: list[Any] = [None, True, -1, 0, 2**31 - 1, 2**63, 1e308, float("inf"), float("nan"), "", "x" * 100_000]
HOSTILE += ["../../harmed", "/tmp/harmed", "a\0b", "\x1b[2J", "os.system", "{}", [], {}, [[[[[[]]]]]], {"a": {"b": []}}]


def mutated_bytes(content: bytes, draw: random.Random) -> bytes:
    """Bytes with one kind of damage: flipped, cut, doubled, overwritten or replaced."""
    data, at = bytearray(content), draw.randrange(len(content) or 1)
    kind = draw.randrange(6)
    if kind == 0:
        for _ in range(draw.randint(1, 8) if data else 0):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at:at] = data[: draw.randint(1, 200)]
    elif kind == 3:
        data[at : at + 8] = draw.choice([b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7, draw.randbytes(8)])
    elif kind == 4:
        del data[at : at + draw.randint(1, 100)]
    else:
        data = bytearray(draw.randbytes(draw.randint(0, 300)))
    return bytes(data)


def mutated_json(value: Any, draw: random.Random) -> Any:
    """JSON with one value changed, removed or added."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        changed = dict(value)
        kind = draw.random()
        if kind < 0.1:
            del changed[key]
        elif kind < 0.15:
            changed[str(draw.choice(HOSTILE))[:50]] = changed.pop(key)
        else:
            changed[key] = mutated_json(value[key], draw)
        return changed
    if isinstance(value, list) and value and draw.random() < 0.9:
        at = draw.randrange(min(len(value), 50))
        return [*value[:at], mutated_json(value[at], draw), *value[at + 1 :]]
    return draw.choice(HOSTILE)


def mutate(file: Path, number: int) -> None:
    """Damages a file, as text or as JSON."""
    draw = random.Random(number)
    content = file.read_bytes()
    if file.suffix in (".json", ".jsonl") and draw.random() < 0.7:
        lines = content.decode().splitlines() if file.suffix == ".jsonl" else [content.decode()]
        at = draw.randrange(len(lines))
        lines[at] = json.dumps(mutated_json(json.loads(lines[at]), draw))
        content = "\n".join(lines).encode()
    else:
        content = mutated_bytes(content, draw)
    file.write_bytes(content)


class Guard:
    """Notes, by Python's audit events, what must not happen while a hostile file is read.

    Attributes:
        folder: Where files may be written; None while nothing is watched.
        harm: What has happened.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.harm: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple) -> None:
        if self.folder is None:
            return
        if event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "os.fork", "socket.connect"):
            self.harm.append(f"{event} {arguments}")
        opened = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if opened or event in ("os.mkdir", "os.rename", "os.remove", "os.symlink", "os.link"):
            self.written(event, arguments[0])

    def written(self, event: str, path: Any) -> None:
        allowed = (str(self.folder), "/dev/null", "/dev/shm", "/tmp/tmp")
        if isinstance(path, (str, Path)) and not str(Path(path).absolute()).startswith(allowed):
            self.harm.append(f"{event} {path}")

    @contextlib.contextmanager
    def watch(self, folder: Path, seconds: int) -> Iterator[None]:
        def hang(*_: object) -> None:
            raise TimeoutError(f"not done in {seconds} s")

        before = signal.signal(signal.SIGALRM, hang)
        signal.alarm(seconds)
        self.folder = folder
        try:
            yield
        finally:
            self.folder = None
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def guard() -> Guard:
    return Guard()


def attack(
    original: Path, read: Callable[[Path], Any], times: int, guard: Guard, tmp_path: Path, refuses: bool = True
) -> None:
    """Reads copies of a folder, in each of which one file is damaged."""
    files = sorted(path.relative_to(original) for path in original.rglob("*") if path.is_file())
    refused = 0
    for number in range(times):
        folder = tmp_path / "copy"
        shutil.copytree(original, folder)
        file = folder / files[number % len(files)]
        mutate(file, number)
        try:
            with guard.watch(tmp_path, 10):
                read(folder)
        except UserError as error:
            refused += 1
            assert len(str(error)) < 1500 and "\n" not in str(error).strip(), str(error)
        except Exception as error:
            raise AssertionError(f"mutation {number} of {file.name}: {type(error).__name__}: {error}") from error
        assert not guard.harm, (number, file.name, guard.harm)
        shutil.rmtree(folder)
    assert refused > times / 20 or not refuses  # else nothing was really damaged


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with all that a report reads, and a checkpoint of a tiny network."""
    import transformers

    folder = tmp_path_factory.mktemp("runs") / "tiny" / "2026-01-01_00-00-00"
    (folder / "checkpoints").mkdir(parents=True)
    config = transformers.GPT2Config(vocab_size=300, n_layer=1, n_embd=8, n_head=1, n_positions=16)
    network = transformers.GPT2LMHeadModel(config)
    own = tokenizer.train(Tokenizer(algorithm="bytes", vocab_size=300), iter(()), "gpt")
    own.save_pretrained(folder / "tokenizer")
    description = {"class": "GPT2LMHeadModel", "config": config.to_dict(), "rows": 300}
    checkpoint = {
        "network": description | {"generation": network.generation_config.to_dict()},
        "state_dict": {f"network.{name}": value for name, value in network.state_dict().items()},
        "global_step": 3,
        "callbacks": {},
    }
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    (folder / "config.yaml").write_text(
        "model: {class_path: CausalLM, init_args: {network: {n_layer: 1}}}\na: [1, b]\n"
    )
    columns = ["train/loss", "val/loss", "train/seconds", "train/tokens", "train/tokens_per_second", "train/memory"]
    rows = [f"step,{','.join(columns)}", *(f"{i},{9 / i},,{i}.5,{i * 100},{i * 9},0.5" for i in range(1, 9))]
    (folder / "metrics.csv").write_text("".join(row + "\n" for row in rows))
    samples = [{"step": i, "prompt": "a", "text": "b\n"} for i in range(3)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    (folder / "spikes.jsonl").write_text(json.dumps({"step": 1, "loss": 2.5, "samples": [1, 2]}) + "\n")
    (folder / "config.1.yaml").write_text("a: &x [1, b]\nb: {c: *x, <<: {d: 1e-3}}\n")
    (folder / "results.csv").write_text("label,precision,f1,rows\na,0.5,0.25,3\nb,1.0,0.5,4\n")
    (folder / "results.md").write_text("validation, step 8\n\n| label |\n")
    (folder / "confusion.csv").write_text("right,a,b\na,2,1\nb,0,4\n")
    mistake = {"evaluation": "validation", "row": 3, "loss": 1.5, "text": "t", "right": "a", "predicted": "b"}
    (folder / "mistakes.jsonl").write_text((json.dumps(mistake) + "\n") * 2)
    (folder / "data.json").write_text(json.dumps({"splits": {"train": {"tokens": 5}}, "files": ["a", "b"]}))
    (folder / "environment.json").write_text(json.dumps({"command": ["fit"], "git": {"commit": "a"}, "cores": 2}))
    return folder


@needs("reports")
@pytest.mark.slow
def test_reports_of_damaged_runs(run: Path, guard: Guard, tmp_path: Path):
    from lm_lightning.reports import history, report

    original = tmp_path / "run"
    shutil.copytree(run, original, ignore=shutil.ignore_patterns("checkpoints", "tokenizer"))

    def read(folder: Path) -> None:
        page = report.page([history.read(folder)])
        data = page.split('type="application/json" id="data">')[1].split("</script>")[0]
        json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))

    attack(original, read, 3000, guard, tmp_path, refuses=False)  # it shows what can be read


@pytest.mark.slow
def test_damaged_checkpoints(run: Path, guard: Guard, tmp_path: Path):
    original = tmp_path / "run"
    shutil.copytree(run / "checkpoints", original)
    attack(original, lambda folder: load_checkpoint(folder / "last.ckpt"), 2000, guard, tmp_path)


@pytest.mark.slow
def test_forged_checkpoints_are_exported_or_refused(run: Path, guard: Guard, tmp_path: Path):
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    refused = 0
    for number in range(1000):
        draw = random.Random(number)
        forged = saved | {"network": mutated_json(saved["network"], draw), "state_dict": dict(saved["state_dict"])}
        if draw.random() < 0.3:
            name = draw.choice(list(forged["state_dict"]))
            forged["state_dict"][name] = draw.choice(
                [torch.zeros(0), torch.zeros(3, 3), torch.zeros(300, 8) / 0, 5, None]
            )
        (tmp_path / "model").mkdir()
        try:
            with guard.watch(tmp_path, 10):
                export.write(forged, run / "tokenizer", tmp_path / "model")
        except UserError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"mutation {number}: {type(error).__name__}: {error}") from error
        assert not guard.harm, (number, guard.harm)
        shutil.rmtree(tmp_path / "model")
    assert refused > 300


@pytest.mark.slow
def test_damaged_tokenizers(run: Path, guard: Guard, tmp_path: Path):
    attack(run / "tokenizer", lambda folder: tokenizer.load(str(folder)), 600, guard, tmp_path)


@pytest.mark.slow
def test_damaged_shards(guard: Guard, tmp_path: Path):
    (tmp_path / "text.txt").write_text("\n\n".join(f"Paragraph {i} of a text." for i in range(60)))
    corpus, options = Corpus(paths=[str(tmp_path / "text.txt")]), Tokenizer(algorithm="bytes", vocab_size=300)
    original = shards.prepare(corpus, options, shards.Layout(), str(tmp_path / "cache")).folder

    def read(folder: Path) -> None:
        shards.check(folder)
        for name in shards.SPLITS:
            shards.open_split(folder, name)

    attack(original, read, 1500, guard, tmp_path)


@pytest.mark.slow
def test_damaged_sharded_checkpoints(guard: Guard, tmp_path: Path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        weights = {"network.a": torch.arange(6.0).reshape(2, 3), "network.b": torch.ones(4)}
        checkpoint = {"state_dict": weights, "global_step": 1, "network": {}}
        sharded_checkpoint.save(checkpoint, tmp_path / "original" / "last.ckpt")
    finally:
        dist.destroy_process_group()
    attack(tmp_path / "original" / "last.ckpt", load_checkpoint, 1000, guard, tmp_path)
    attack(tmp_path / "original" / "last.ckpt", sharded_checkpoint.gather, 500, guard, tmp_path)


@needs("tasks.embedding")
@pytest.mark.slow
def test_damaged_indexes(guard: Guard, tmp_path: Path):
    from lm_lightning.tasks.embedding import search

    original = tmp_path / "index"
    (original / "model").mkdir(parents=True)
    np.save(original / "embeddings.npy", np.eye(5, 4, dtype=np.float32))
    rows = [{"id": number, "text": f"text {number}"} for number in range(5)]
    (original / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (original / "index.json").write_text(json.dumps({"model": "model", "pooling": "mean", "max_length": 16}))

    def read(folder: Path) -> None:
        about = search.read_about(search.index_folder(str(folder)))
        assert Path(search.model_of(folder, about, None)) == folder.resolve() / "model"
        embeddings = search.read_embeddings(folder)
        found = search.read_rows(folder, {0, 3}, len(embeddings))
        assert all(isinstance(row["text"], str) for row in found.values())

    attack(original, read, 1000, guard, tmp_path)


@pytest.fixture(scope="module")
def model(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as a run has it."""
    folder = tmp_path_factory.mktemp("models") / "model"
    folder.mkdir()
    export.write(load_checkpoint(run / "checkpoints" / "last.ckpt"), run / "tokenizer", folder)
    return folder


@needs("tasks.generation")
@pytest.mark.slow
def test_damaged_models_that_generate(model: Path, guard: Guard, tmp_path: Path):
    from lm_lightning.tasks.generation import generate
    from lm_lightning.tasks.generation.generation import Sampling, prompt_ids

    def read(folder: Path) -> None:
        network, own = generate.load(str(folder), "cpu")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ids = prompt_ids(own, "a b")
            generate.stream(network, own, ids, 2, Sampling(greedy=True))

    attack(model, read, 200, guard, tmp_path)


@needs("compression")
@pytest.mark.slow
def test_damaged_models_that_are_compressed(model: Path, guard: Guard, tmp_path: Path):
    from lm_lightning.compression import folder as compressed

    attack(model, compressed.load, 200, guard, tmp_path)


@needs("tasks.embedding")
@pytest.mark.slow
def test_damaged_models_of_an_index(model: Path, guard: Guard, tmp_path: Path):
    from lm_lightning.tasks.embedding import search

    attack(model, lambda folder: search.embedded("a", str(folder), search.About("", "mean", 8)), 100, guard, tmp_path)
