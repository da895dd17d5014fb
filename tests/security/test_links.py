"""Nothing that is written into a run folder goes through a link that was put there, or stays half written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lm_lightning import files
from lm_lightning.__main__ import commands
from lm_lightning.errors import UserError
from lm_lightning.security import untrusted


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file that must not change."""
    file = tmp_path / "outside"
    file.write_text("mine")
    return file


def test_writers_replace_links_and_leave_what_they_lead_to(outside: Path, tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    place = run / "file"
    place.symlink_to(outside)
    files.write_text(place, "text")
    assert place.read_text() == "text" and not place.is_symlink()
    (run / "folder").symlink_to(tmp_path)
    with files.replacing_folder(run / "folder") as folder:
        (folder / "outside").write_text("new")
    assert (run / "folder" / "outside").read_text() == "new" and not (run / "folder").is_symlink()
    (run / "log").symlink_to(outside)
    with pytest.raises(UserError, match="log is a link"):
        files.append(run / "log", "text")
    assert outside.read_text() == "mine"


def test_what_a_killed_process_has_left_is_removed_and_what_a_running_one_writes_is_not(tmp_path: Path):
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    left = tmp_path / f"report.html.{files.host()}-{int(ended.stdout)}-0123abcd.partial"
    running = tmp_path / f"report.html.{files.host()}-{os.getppid()}-0123abcd.partial"
    elsewhere = tmp_path / "report.html.another-1-0123abcd.partial"
    for file in (left, running, elsewhere):
        file.write_text("half")
    files.write_text(tmp_path / "report.html", "page")
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", running.name, elsewhere.name}


def test_a_folder_takes_the_place_of_another_only_when_it_is_finished(tmp_path: Path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old").touch()
    with pytest.raises(RuntimeError), files.replacing_folder(folder) as partial:
        (partial / "new").touch()
        raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "old"]
    with files.replacing_folder(folder) as partial:
        (partial / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "new"]


@pytest.mark.slow
def test_commands_refuse_a_run_with_links_to_elsewhere_before_they_write(fit, cli, recipe: Path, outside: Path):
    run = fit("--trainer.max_steps", 3, "--trainer.limit_val_batches", 1)
    for name in ("report.html", "samples.jsonl", "checkpoints/x.ckpt", "model/extra.json"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(outside)
        before = sorted(path.stat().st_mtime_ns for path in run.rglob("*") if not path.is_symlink())
        for command in (
            ("fit", "--config", recipe, "--ckpt_path", "last", "--trainer.max_steps", 5),
            ("validate", run),
            ("predict", run),
            ("export", run),
        ):
            if command[0] not in commands():
                continue
            with pytest.raises(UserError, match="is a link to .*outside"):
                cli(*command)
        assert before == sorted(path.stat().st_mtime_ns for path in run.rglob("*") if not path.is_symlink())
        (run / name).unlink()
    assert outside.read_text() == "mine"


@pytest.mark.slow
def test_a_run_that_resumes_writes_through_no_link_and_leaves_no_half_file(
    fit, cli, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The second line of defense, of links that are made after the first one has looked."""
    run = fit("--trainer.max_steps", 3, "--trainer.limit_val_batches", 1)
    shutil.copytree(run, tmp_path / "copy")
    names = ["config.yaml", "environment.json", "data.json", "metrics.csv", "report.html", "checkpoints/last.ckpt"]
    before = {}
    names = [name for name in [*names, "tokenizer", "model"] if (run / name).exists()]
    for number, name in enumerate(names):
        target = tmp_path / f"target-{number}"
        (run / name).rename(target)
        (run / name).symlink_to(target)
        before |= {file: file.read_bytes() for file in [target, *target.rglob("*")] if file.is_file()}
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (run / f"model.{files.host()}-{int(ended.stdout)}-0123abcd.partial").mkdir()
    monkeypatch.setattr(untrusted, "refuse_links", lambda run: None)
    cli("fit", "--config", recipe, "--ckpt_path", "last", "--trainer.max_steps", 5, "--trainer.limit_val_batches", 1)
    assert {file: file.read_bytes() for file in before} == before
    assert not [path for path in run.rglob("*") if path.is_symlink() or path.name.endswith(".partial")]
    assert (run / "config.1.yaml").read_bytes() == before[tmp_path / "target-0"]
