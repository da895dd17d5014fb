"""report: run folders in, a page out that says what they say and lets nothing of them do anything."""

import csv
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from conftest import needs
from lightning.pytorch import Callback, LightningModule, Trainer

from lm_lightning.environment import git
from lm_lightning.errors import UserError
from lm_lightning.reports import curves
from lm_lightning.reports import page as report_page

VOID = {"meta", "wbr", "img", "link"}


class Page(HTMLParser):
    """A page as a browser reads it: elements that are open and closed in order, their texts, the JSON of the curves."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.rows: list[list[str]] = []
        self.text, self.data = "", ""
        self.feed(file.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []
        self.curves = json.loads(self.data, parse_constant=pytest.fail)  # browsers read no NaN

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.data = self.data or data
        elif self.open and self.open[-1] != "style":
            self.text += data
            if {"td", "th"} & set(self.open):
                self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        """The cells of a table's row."""
        return next(row[1:] for row in self.rows if row[0] == name)

    def lines(self, chart: str) -> dict[tuple[str, int], dict]:
        """The lines of a chart, by part and run."""
        (lines,) = (c["lines"] for c in self.curves["charts"] if c["name"] == chart)
        return {(line["part"], line["run"]): line for line in lines}


def column(run: Path, name: str) -> dict[int, float]:
    with open(run / "metrics.csv", newline="") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small run folder without a run."""
    run = tmp_path / "runs" / "made" / "up"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("seed_everything: 1\ndata: {batch_size: 4}\n")
    (run / "metrics.csv").write_text("step,train/loss,val/loss\n1,5.5,\n2,4.5,\n2,,4.25\n")
    return run


@needs("generation")
def test_run_leaves_a_report_that_says_what_was_logged(fit):
    sampling = [{"class_path": "Samples", "init_args": {"prompts": ["The old"]}}]
    run = fit("--trainer.callbacks", json.dumps(sampling))
    page = Page(run / "report.html")
    assert page.curves["runs"] == [f"tiny/{run.name}"]
    for name in ("loss", "learning_rate", "gradient_norm", "memory", "tokens_per_second"):
        line = page.lines(name)["train", 0]
        assert dict(zip(line["step"], line["value"])) == column(run, f"train/{name}") and len(line["step"]) == 10
        assert dict(zip(line["step"], line["tokens"])) == {step: step * 4 * 32 for step in range(1, 11)}
        assert line["seconds"] == list(column(run, "train/seconds").values()) == sorted(line["seconds"])
    validation = page.lines("loss")["val", 0]
    assert dict(zip(validation["step"], validation["value"])) == column(run, "val/loss")
    assert validation["tokens"] == [5 * 4 * 32, 10 * 4 * 32]

    lowest = min(column(run, "val/loss").values())
    assert page.row("lowest validation loss")[0].startswith(f"{lowest:.4f} at step ")
    assert page.row("state") == ["finished"] and page.row("tokens") == ["1,280"] and page.row("steps") == ["10"]
    assert page.row("data.init_args.block_size") == ["32"]
    assert page.row("torch") == [torch.__version__]
    assert page.row("cpu")[0] and page.row("memory")[0].endswith("GiB")
    (first, *_) = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert first["text"].strip().split("\n")[0] in page.text and "after “The old”" in page.text


def test_correct_texts_are_shown_beside_samples(folder: Path, cli):
    rows = [{"step": step, "prompt": "Hallo", "text": f"text {step}", "reference": "<Hello>"} for step in (1, 2)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cli("report", folder)
    text = Page(folder / "report.html").text
    assert "for “Hallo”" in text and text.count("<Hello>") == 1 and "text 2" in text


def test_page_needs_no_network(folder: Path, cli):
    assert cli("report", folder).strip() == str(folder / "report.html")
    page = Page(folder / "report.html")
    assert not {"link", "img", "iframe", "base", "object"} & {tag for tag, _ in page.elements}
    assert not {"src", "href"} & {name for _, attributes in page.elements for name in attributes}
    text = (folder / "report.html").read_text().replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    assert not re.search(r"https?:|url\(|@import|fetch\(", text)


def test_texts_of_a_run_stay_texts(folder: Path, cli):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \x00\x1b \ud800 {{DATA}} \\1"
    (folder / "samples.jsonl").write_text(json.dumps({"step": 1, "prompt": evil, "text": evil}) + "\n")
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": "<b>bold</b>", "<i>": "<u>"}))
    (folder / "environment.json").write_text(json.dumps({"command": ["<script>alert(3)</script>"]}))
    (folder / "metrics.csv").write_text("step,train/</script><b>loss\n1,2.5\n")
    moved = folder.rename(folder.with_name("<b>up<b>"))
    cli("report", moved)
    page = Page(moved / "report.html")
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2 and not {"img", "i", "u"} & set(tags)
    assert "<img src=x onerror=alert(2)> & \ufffd\ufffd \ufffd {{DATA}} \\1" in page.text
    assert "<b>bold</b>" in page.text and "<script>alert(3)</script>" in page.text
    assert page.lines("</script><b>loss")["train", 0]["value"] == [2.5]
    assert page.curves["runs"] == ["made/<b>up<b>"]


def test_blank_lines_of_a_sample_are_counted(folder: Path, cli):
    row = {"step": 1, "prompt": "", "text": "one\n\ntwo" + "\n" * 30 + "three"}
    (folder / "samples.jsonl").write_text(json.dumps(row) + "\n")
    cli("report", folder)
    assert "one\n\ntwo\n[30 line breaks]\nthree" in Page(folder / "report.html").text


def test_runs_are_laid_over_each_other_with_what_differs(fit, cli, tmp_path: Path):
    first, second = fit("--name", "first"), fit("--name", "second", "--data.batch_size", 2)
    output = tmp_path / "both.html"
    assert cli("report", first, second, "--output", output).strip() == str(output)
    page = Page(output)
    lines = page.lines("loss")
    for number, run in enumerate((first, second)):
        assert lines["train", number]["value"] == list(column(run, "train/loss").values())
    assert lines["train", 1]["tokens"][-1] == 10 * 2 * 32
    differences = page.text.split("Differences")[1].split("All options")[0]
    assert "data.init_args.batch_size" in differences and "name" in differences
    assert "block_size" not in differences and "max_steps" not in differences
    assert page.row("data.init_args.batch_size") == ["4", "2"]


def test_resumed_run_has_one_curve_of_tokens_and_time_and_tells_what_was_changed(fit):
    run = fit("--model.schedule.shape", "constant", "--trainer.max_steps", 6)
    before = column(run, "train/seconds")
    assert fit("--model.schedule.shape", "constant", "--ckpt_path", "last") == run
    line = Page(run / "report.html").lines("loss")["train", 0]
    assert line["step"] == list(range(1, 11)) and line["tokens"] == [step * 4 * 32 for step in range(1, 11)]
    assert line["seconds"][:6] == list(before.values()) and line["seconds"] == sorted(line["seconds"])
    page = Page(run / "report.html")
    assert f"Changed when tiny/{run.name} was resumed" in page.text
    assert page.row("trainer.max_steps") == ["6", "10"]


class SaveAndFail(Callback):
    """Saves when one of the two micro-batches of the third step is done, and ends the run."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: dict, batch_idx: int) -> None:
        if batch_idx == 5 and pl_module.resumed_at == 0:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt")
            raise RuntimeError("power failure")


def test_step_that_is_done_again_counts_once(fit):
    flags = ("--trainer.accumulate_grad_batches", 2, "--trainer.val_check_interval", 10, "--trainer.max_steps", 4)
    with pytest.raises(RuntimeError, match="power failure"):
        fit(*flags, "--trainer.callbacks", '["test_report.SaveAndFail"]')
    run = fit(*flags, "--ckpt_path", "last")
    assert column(run, "train/tokens") == {step: step * 2 * 4 * 32 for step in range(1, 5)}


def test_run_without_checkpoints_has_a_whole_report(fit):
    run = fit("--trainer.enable_checkpointing", "false")
    assert Page(run / "report.html").lines("loss")["train", 0]["step"] == list(range(1, 11))


def test_cut_and_missing_files_are_told_and_the_rest_is_shown(folder: Path, cli):
    (folder / "metrics.csv").write_text("step,train/loss,val/loss\n1,5.5,\n2,4.5,\nx,y,z\n3,1.2")
    (folder / "environment.json").write_text('{"torch": "2.13')
    (folder / "samples.jsonl").write_text('{"step": 5, "prompt": "", "text": "whole"}\n{"step": 9, "pro')
    (folder / "spikes.jsonl").write_bytes(b'{"step": 2, "loss": 4.5, "samples": [3, 4]}\n[1]\n\xff')
    cli("report", folder)
    page = Page(folder / "report.html")
    assert page.lines("loss")["train", 0]["value"] == [5.5, 4.5]
    assert page.lines("loss")["spike", 0]["step"] == [2]
    for note in (
        "metrics.csv: incomplete",
        "environment.json is incomplete",
        "samples.jsonl: incomplete",
        "spikes.jsonl: incomplete",
    ):
        assert note in page.text
    assert "omitted (2)" in page.text and "whole" in page.text and "3, 4" in page.text
    assert page.row("state") == ["not finished (no model/)"]

    for file in folder.iterdir():
        if file.name != "config.yaml":
            file.unlink()
    (folder / "config.yaml").write_text("a: [1")
    (folder / "metrics.csv").touch()
    cli("report", folder)
    page = Page(folder / "report.html")
    assert (
        page.curves["charts"] == [] and "Nothing was logged." in page.text and "config.yaml is incomplete" in page.text
    )


def test_loss_that_is_not_finite_is_a_gap(folder: Path, cli):
    (folder / "metrics.csv").write_text("step,train/loss,val/loss\n1,2.5,\n2,nan,inf\n3,1.5,\n")
    cli("report", folder)
    page = Page(folder / "report.html")
    assert page.lines("loss")["train", 0]["value"] == [2.5, None, 1.5]
    assert page.lines("loss")["val", 0]["value"] == [None]


def test_long_curve_is_thinned_but_keeps_its_extremes_and_ends(folder: Path, cli):
    values = [3 + math.sin(step) for step in range(20000)]
    values[777], values[12345], values[15000] = 99.0, -5.0, math.nan
    rows = "".join(f"{step},{value!r}\n" for step, value in enumerate(values))
    (folder / "metrics.csv").write_text("step,train/loss\n" + rows)
    cli("report", folder)
    lines = Page(folder / "report.html").lines("loss")
    train = lines["train", 0]
    points = dict(zip(train["step"], train["value"]))
    assert 500 < len(points) <= curves.POINTS
    assert points[777] == 99 and points[12345] == -5 and points[15000] is None
    assert points[0] == values[0] and points[19999] == values[-1]
    assert train["step"] == sorted(train["step"])
    assert lines["mean", 0]["value"][10] == pytest.approx(3, abs=0.1)


def test_what_is_no_run_folder_is_refused(folder: Path, cli, tmp_path: Path):
    with pytest.raises(UserError, match="made is not a run folder, but contains 1 of them: give .*made.up"):
        cli("report", folder, folder.parent)
    with pytest.raises(UserError, match="give one, such as .*made.up"):  # as the folder of all runs
        cli("report", folder.parent.parent)
    with pytest.raises(UserError, match="nothing does not exist"):
        cli("report", tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty is not a run folder: it has no config.yaml"):
        cli("report", tmp_path / "empty")
    with pytest.raises(UserError, match="nowhere/page.html cannot be written .*--output"):
        cli("report", folder, "--output", tmp_path / "nowhere" / "page.html")


def test_run_whose_report_fails_is_a_run(fit, cli, recipe: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise RuntimeError("no space")

    monkeypatch.setattr(report_page, "write", fail)
    out = cli("fit", "--config", recipe, "--trainer.max_steps", 3)
    assert "the report could not be written: RuntimeError: no space" in out and "model: " in out


def test_environment_names_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git() is None
    identity = ("-c", "user.name=n", "-c", "user.email=e")
    (tmp_path / "code.py").write_text("a = 1")
    for arguments in (("init", "-q"), ("add", "."), (*identity, "commit", "-qm", "first")):
        subprocess.run(["git", *arguments], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert git() == {"commit": head, "changed": False}
    (tmp_path / "code.py").write_text("a = 2")
    assert git() == {"commit": head, "changed": True}


def test_steps_that_were_not_logged_count(fit):
    run = fit("--trainer.log_every_n_steps", 4, "--trainer.limit_val_batches", 0)
    page = Page(run / "report.html")
    assert page.row("steps") == ["10"] and page.row("tokens") == [f"{8 * 4 * 32:,} (at step 8)"]


def test_best_metric_is_the_one_that_decides(folder: Path, cli):
    (folder / "config.yaml").write_text("best: {monitor: val/accuracy, mode: null}\n")
    rows = "1,,2.0,0.5\n2,,1.0,0.75\n3,,1.5,0.75\n4,,3.0,0.25\n"
    (folder / "metrics.csv").write_text("step,train/loss,val/loss,val/accuracy\n" + rows)
    cli("report", folder)
    page = Page(folder / "report.html")
    assert page.row("lowest validation loss") == ["1.0000 at step 2"]
    assert page.row("best validation accuracy (decides the best checkpoint)") == ["0.7500 at step 2"]
    (folder / "config.yaml").write_text("best: {monitor: val/mae}\n")
    (folder / "metrics.csv").write_text("step,val/mae\n1,2.0\n2,1.5\n3,1.75\n")
    cli("report", folder)
    assert Page(folder / "report.html").row("best validation mae (decides the best checkpoint)") == ["1.5000 at step 2"]


def test_labels_confusion_and_mistakes_are_shown(folder: Path, cli):
    (folder / "results.csv").write_text(
        "label,precision,recall,f1,rows\nold,0.123456,1.0,0.5,10\n<b>new,0.0,0.0,0.0,4\n"
    )
    (folder / "results.md").write_text("validation, step 7\n\n| label |\n")
    (folder / "confusion.csv").write_text("true \\ predicted,old,<b>new\nold,8,2\n<b>new,4,0\n")
    mistake = {"evaluation": "validation, step 7", "row": 1234, "loss": 3.5, "correct": "old", "predicted": "<b>new"}
    lines = [json.dumps(mistake | {"text": "<i>some</i> text"}), json.dumps(mistake)]  # the second was cut
    (folder / "mistakes.jsonl").write_text("\n".join(lines))
    cli("report", folder)
    page = Page(folder / "report.html")
    assert page.text.count("validation, step 7") == 3 and not {"i", "b"} & {tag for tag, _ in page.elements}
    assert ["old", "0.123", "1.000", "0.500", "10"] in page.rows
    assert ["<b>new", "0.000", "0.000", "0.000", "4"] in page.rows
    assert ["old", "8", "2"] in page.rows and ["<b>new", "4", ""] in page.rows
    shares = [attributes["style"] for tag, attributes in page.elements if tag == "td" and "style" in attributes]
    assert shares == ["--share:0.800", "--share:0.200", "--share:1.000", "--share:0.000"]
    assert ["old", "<b>new", "<i>some</i> text", "3.5", "1,234"] in page.rows
    assert "mistakes.jsonl: incomplete" in page.text


def test_curves_are_smoothed_and_zoomed(folder: Path, cli, tmp_path: Path):
    """The page's own script, run by Node.js with as much of a page as it needs."""
    node = shutil.which("node") or pytest.skip("needs Node.js")
    cli("report", folder)
    text = (folder / "report.html").read_text()
    script = text[text.index('"use strict"') : text.rindex("</script>")]
    page = """
const document = { getElementById: id => id === "data" ? { textContent: DATA } : null, querySelectorAll: () => [],
  createElement: () => ({ setAttribute() {}, append() {}, addEventListener() {} }) };
"""
    check = """
shown.smooth = 0.5;
const points = [4, 2, null, 1].map((y, x) => ({ x, y, drawn: y !== null }));
console.log(JSON.stringify(smoothed(points).map(point => point.y)));
zoom([2, 3]); console.log(JSON.stringify([shown.zoom, fullCurves.hidden]));
zoom(null); console.log(JSON.stringify([shown.zoom, fullCurves.hidden]));
"""
    data = json.dumps(json.dumps({"runs": ["a"], "charts": []}))
    (tmp_path / "page.js").write_text(page.replace("DATA", data) + script.replace('"use strict";', "") + check)
    result = subprocess.run([node, tmp_path / "page.js"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    values, zoomed, whole = map(json.loads, result.stdout.splitlines())
    # Of the first, the weight is 1/2; of both, 1/4 and 1/2; of all three, 1/8, 1/4 and 1/2, each divided by their sum.
    assert values == pytest.approx([4, (1 + 1) / 0.75, None, (0.5 + 0.5 + 0.5) / 0.875])
    assert zoomed == [[2, 3], False] and whole == [None, True]
