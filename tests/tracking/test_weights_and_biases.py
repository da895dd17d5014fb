"""W&B: runs that are written offline, read back and compared with what was logged."""

import csv
import json
import os
import signal
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
import yaml
from conftest import ROOT, command, evaluation, needs
from lightning.pytorch import Callback, Trainer
from processes import Runs
from wandb.proto import wandb_internal_pb2 as pb  # noqa: E402

from lm_lightning.errors import UserError  # noqa: E402

OVERLAY = ROOT / "configs" / "tracking" / "wandb.yaml"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No key, no settings and no network."""

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    wandb.teardown()  # so that they are read anew
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        os.environ.pop(name)  # not with monkeypatch, which would restore the address of a service that has ended
    wandb.teardown()


class Kill(Callback):
    """Kills the process in a step, when W&B has had time to write what was logged before."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)


class Part:
    """What one start of a run has written: a log in LevelDB's format, of protobuf records."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (file,) = folder.glob("*.wandb")
        records: dict[str, list] = {}
        for record in self.records(file.read_bytes()):
            kind = record.WhichOneof("record_type")
            records.setdefault(kind, []).append(getattr(record, kind))
        self.of, self.run = records, records["run"][0]
        self.rows = [values(record.item) for record in records.get("history", ())]
        self.config: dict = {}
        for record in [self.run.config, *records.get("config", ())]:
            self.config |= values(record.update)

    def records(self, data: bytes) -> Iterator:
        position, parts = 7, b""  # after the file's header
        while position + 7 <= len(data):
            rest = 2**15 - position % 2**15
            if rest < 7:  # the end of a block
                position += rest
                continue
            size, kind = struct.unpack("<4xHB", data[position : position + 7])
            parts += data[position + 7 : position + 7 + size]
            position += 7 + size
            if kind in (1, 4):  # whole, or the last part
                record = pb.Record()
                record.ParseFromString(parts)
                parts = b""
                yield record

    def tables(self, name: str) -> list[list]:
        """The rows of all tables of a name."""
        paths = [row[f"{name}.path"] for row in self.rows if f"{name}.path" in row]
        return [row for path in paths for row in json.loads((self.folder / "files" / path).read_text())["data"]]


def values(items) -> dict:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def artifacts(part: Part) -> dict[str, list]:
    found: dict[str, list] = {}
    for artifact in part.of.get("artifact", ()):
        found.setdefault(artifact.type, []).append(artifact)
    return found


def parts(run: Path) -> list[Part]:
    wandb.teardown()  # as at the end of a process: `finish` returns before all is in the file
    found = [Part(folder) for folder in (run / "wandb").glob("*run-*-*")]
    return sorted(found, key=lambda part: part.run.start_time.ToNanoseconds())


def logged(run: Path) -> list[dict[str, float]]:
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: float(value) for name, value in row.items() if value and name != "step"} for row in rows]


@pytest.mark.slow
def test_an_offline_run_has_all_that_was_logged(fit, capsys):
    flags = ("--trainer.logger.project", "apples", "--trainer.logger.entity", "fruit", "--trainer.logger.notes", "n.b.")
    run = fit("--config", OVERLAY, *flags, "--trainer.logger.tags", "[red, small]")
    (part,) = parts(run)
    assert (part.run.project, part.run.entity, part.run.notes, list(part.run.tags)) == (
        *("apples", "fruit", "n.b."),
        ["red", "small"],
    )
    own = ("_step", "_runtime", "_timestamp", "trainer/global_step", "trainer/part")
    rows = [{name: value for name, value in row.items() if name not in own} for row in part.rows]
    assert len(rows) == 12 and rows == [pytest.approx(row) for row in logged(run)]
    assert [row["trainer/global_step"] for row in part.rows] == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10]
    assert {"train/tokens_per_second", "train/memory"} <= rows[0].keys()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert {name: part.config[name] for name in config} == config
    assert any("cpu" in item.key for item in part.of["stats"][0].item)  # of the machine


@pytest.mark.slow
def test_checkpoints_and_model_are_artifacts_that_stay_as_they_were(fit):
    run = fit("--config", OVERLAY)
    files = [run / "checkpoints" / "last.ckpt", *(run / "model").iterdir()]
    before = {file.name: file.read_bytes() for file in files}
    worse = ("--model.optimizer.lr", 1.0)  # so that the best checkpoint stays that of step 10
    fit("--config", OVERLAY, "--ckpt_path", "last", "--trainer.max_steps", 12, *worse, "--export", "last")
    first, second = map(artifacts, parts(run))
    assert [set(artifact.aliases) for artifact in first["checkpoint"]] == [
        {"step-10", "best", "latest"},
        {"step-10", "last", "latest"},
    ]
    (model,) = first["model"]
    assert "step-10" in model.aliases and model.name == f"model-{(run / 'wandb' / 'id').read_text()}"
    contents = [*first["checkpoint"][1].manifest.contents, *model.manifest.contents]
    assert {content.path: Path(content.local_path).read_bytes() for content in contents} == before
    assert before["last.ckpt"] != (run / "checkpoints" / "last.ckpt").read_bytes()
    assert "step-12" in second["model"][0].aliases
    assert [artifact.name for artifact in second["model"]] == [model.name]
    assert ["best" in artifact.aliases for artifact in second["checkpoint"]] == [False]  # that is the one of before


def test_no_artifacts_if_they_are_not_wanted(fit):
    run = fit("--config", OVERLAY, "--trainer.logger.log_model", "false")
    assert "artifact" not in parts(run)[0].of and not (run / "wandb" / "artifacts").exists()


@needs("generation", "diagnostics")
@pytest.mark.slow
def test_samples_and_gradients_and_predictions(fit, cli, recipe: Path):
    callbacks = [{"class_path": "Samples", "init_args": {"prompts": ["", "The old"]}}, {"class_path": "Gradients"}]
    callbacks[1]["init_args"] = {"every_n_steps": 4}
    run = fit("--config", OVERLAY, "--trainer.callbacks", json.dumps(callbacks), "--model.network.n_layer", 1)
    (part,) = parts(run)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert part.tables("samples") == [list(row.values()) for row in samples]

    histograms = [row for row in part.rows if any(name.startswith("gradients/") for name in row)]
    assert [row["trainer/global_step"] for row in histograms] == [4, 8]
    name = "gradients/transformer.wte.weight"
    counts, bins = (histograms[1][f"{name}.{key}"] for key in ("values", "bins"))
    assert sum(counts) == 32 * 320 and len(bins) == len(counts) + 1 and bins[0] < 0 < bins[-1]

    cli("predict", "--config", recipe, "--config", OVERLAY, "--ckpt_path", "last", "--model.network.n_layer", 1)
    predictions = [json.loads(line) for line in (evaluation(run) / "predictions.jsonl").read_text().splitlines()]
    first, second = parts(run)
    assert second.run.run_id == first.run.run_id and "artifact" in first.of
    assert second.tables("predictions") == [list(row.values()) for row in predictions]
    assert "checkpoint" not in artifacts(second)


def steps(part: Part) -> list[tuple[int, int]]:
    return [(row["trainer/part"], row["trainer/global_step"]) for row in part.rows if "trainer/global_step" in row]


@pytest.mark.slow
def test_a_killed_run_goes_on_as_the_same_and_steps_done_again_are_told_apart(fit, recipe: Path):
    kill = {"class_path": "test_weights_and_biases.Kill", "init_args": {"step": 8}}
    flags = ("--config", OVERLAY, "--last.every_n_train_steps", 5)
    tests = os.environ | {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}:{ROOT / 'tests'}"}
    result = command("fit", "--config", recipe, *flags, "--trainer.callbacks", json.dumps([kill]), env=tests)
    assert result.returncode == -9, result.stderr
    run = fit(*flags, "--ckpt_path", "last")
    first, second = parts(run)
    assert first.run.run_id == second.run.run_id and second.run.resume
    assert steps(first) == [(0, step) for step in (1, 2, 3, 4, 5, 5, 6, 7)]
    assert steps(second) == [(1, step) for step in (5, 6, 7, 8, 9, 10, 10)]
    assert second.of["exit"][0].exit_code == 0
    axes = {metric.glob_name: metric.step_metric for metric in second.of["metric"]}
    assert axes["*"] == "trainer/global_step"


@needs("sharding", "diagnostics")
@pytest.mark.slow
def test_two_processes_are_one_run_and_go_on_as_one(recipe: Path, tmp_path: Path):
    runs = Runs(tmp_path / "two")
    runs.folder.mkdir()
    histograms = ("--trainer.callbacks+=Gradients", "--trainer.callbacks.every_n_steps", 10)
    flags = ("fit", "--config", recipe, "--config", OVERLAY, "--trainer.devices", 2, "--data.batch_size", 2)
    flags += tuple(f"--model.network.{name}_pdrop=0" for name in ("resid", "embd", "attn"))
    last = runs.folder / "ddp" / "checkpoints" / "last.ckpt"
    runs(
        {
            "ddp": (*flags, "--trainer.strategy", "ddp", *histograms),
            "resumed": (*flags, "--trainer.strategy", "ddp", "--ckpt_path", last, "--trainer.max_steps", 12),
            "fsdp2": (*flags, "--trainer.strategy", "fsdp2", *histograms),
        }
    )
    assert not any(map(runs.error, ("ddp", "resumed", "fsdp2")))
    first, second = parts(runs.folder / "ddp")
    assert first.run.run_id == second.run.run_id
    assert not (runs.folder / "resumed" / "wandb").exists()
    losses = [row["train/loss"] for part in (first, second) for row in part.rows if "train/loss" in row]
    assert losses == pytest.approx([row["train/loss"] for row in logged(runs.folder / "ddp") if "train/loss" in row])
    assert len(losses) == 12 and steps(second)[0] == (1, 11)
    (sharded,) = parts(runs.folder / "fsdp2")
    whole, shards = ({k: v for row in part.rows for k, v in row.items() if "wte" in k} for part in (first, sharded))
    name = "gradients/transformer.wte.weight"
    assert shards[f"{name}.bins"] == pytest.approx(whole[f"{name}.bins"], abs=1e-3)
    assert sum(shards[f"{name}.values"]) == sum(whole[f"{name}.values"]) == 32 * 320


def test_without_a_key_it_is_offline_and_says_how_to_send_the_run(cli, recipe: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("the network is asked"))
    out = cli("fit", "--config", recipe, "--config", OVERLAY)
    (line,) = [line for line in out.splitlines() if "W&B" in line]
    (folder,) = recipe.parent.glob("runs/tiny/*/wandb")
    assert "offline" in line and "no API key" in line and f"`wandb sync {folder}`" in line
    assert len(list(folder.glob("offline-run-*"))) == 1


@pytest.mark.slow
def test_a_server_that_does_not_answer_makes_it_offline(cli, recipe: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    out = cli("fit", "--config", recipe, "--config", OVERLAY, "--trainer.logger.timeout", 1)
    (line,) = [line for line in out.splitlines() if "W&B:" in line]
    assert "http://127.0.0.1:9 does not answer" in line and "wandb sync" in line
    (run,) = recipe.parent.glob("runs/tiny/*")
    assert len(parts(run)[0].rows) == 12


def test_wandb_that_is_not_installed_is_named_with_its_command(fit, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    with pytest.raises(UserError, match=r'pip install -e "\.\[wandb\]"'):
        fit("--config", OVERLAY)


def test_the_sweep_is_one_that_an_agent_can_run(cli, recipe: Path, monkeypatch: pytest.MonkeyPatch):
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    sweep = yaml.safe_load((ROOT / "configs" / "tracking" / "wandb_sweep.yaml").read_text())
    chosen = {
        name: {"value": choice.get("min", choice.get("values", [0])[-1])}
        for name, choice in sweep["parameters"].items()
    }
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")  # as an agent gives it
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    arguments = [argument for argument in sweep["command"] if not argument.startswith("$")][2:]
    assert arguments == ["fit", "--config=configs/gpt.yaml", "--config=configs/tracking/wandb.yaml"]
    flags = create_sweep_command_args({"args": chosen})["args"]
    out = cli("fit", "--config", recipe, "--config", OVERLAY, *flags, "--trainer.max_steps", 11)
    (part,) = parts(Path(out.split("run folder: ")[1].splitlines()[0]))
    assert part.run.run_id == "abc123" and part.run.sweep_id == "sweep1"
    assert part.config["model"]["init_args"]["schedule"] == {"shape": "wsd", "warmup_ratio": 0.02} | {
        "warmup_steps": 2,  # of the recipe
        "min_lr_ratio": 0.1,
        "decay_ratio": 0.2,
    }
    assert any(sweep["metric"]["name"] in row for row in part.rows)


def test_any_logger_of_lightning_is_added_by_yaml_alone(fit, tmp_path: Path):
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "<run>/other"}}
    (tmp_path / "logger.yaml").write_text(yaml.safe_dump({"trainer": {"logger+": [logger]}}))
    run = fit("--config", tmp_path / "logger.yaml")
    assert (run / "metrics.csv").exists() and list((run / "tensorboard").iterdir())
    assert list((run / "other").rglob("metrics.csv"))
