"""Run folders of other people, or damaged ones: their report is a page that shows what can be read, soon."""

import json
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lm_lightning import yaml_text
from lm_lightning.cli import settings
from lm_lightning.errors import UserError
from lm_lightning.reports import history
from lm_lightning.reports import page as report_page

NUMBERS = ["inf", "-inf", "nan", "1e308", "-1e308", "9" * 400, "1e-320", ""]


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    """Ends a test that hangs."""

    def hang(*_: object) -> None:
        raise TimeoutError("not done in 60 s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "hostile" / "2026-01-01_00-00-00"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("model: {class_path: CausalLM}\nbest: {monitor: val/loss}\n")
    return folder


def page(run: Path) -> tuple[str, dict[str, Any]]:
    """The report, and the numbers in it, which are JSON."""
    text = report_page.page([history.read(run)])
    data = text.split('type="application/json" id="data">')[1].split("</script>")[0]
    assert len(text) < 30_000_000
    return text, json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_numbers_that_are_not_finite_break_no_page(run: Path):
    columns = ["train/loss", "train/tokens", "train/seconds", "train/tokens_per_second", "train/memory", "val/loss"]
    rows = [f"{step},{','.join(NUMBERS[(step + i) % len(NUMBERS)] for i in range(6))}" for step in range(2000)]
    steps = ["inf", "nan", "1e400", "-1", "9" * 30, "9" * 5000, "²", ""]
    rows += [f"{step},1,1,1,1,1,1" for step in steps]
    (run / "metrics.csv").write_text("\n".join(["step," + ",".join(columns), *rows]) + "\n")
    lines = [f'{{"step": {step}, "loss": {loss}, "samples": [1]}}' for step in (1, "Infinity") for loss in ("NaN", 1)]
    (run / "spikes.jsonl").write_text("\n".join([*lines, '{"step": 1e999, "loss": 1, "samples": []}']) + "\n")
    text, data = page(run)
    assert "metrics.csv: incomplete or damaged rows are omitted (8)" in text and "spikes.jsonl: incomplete" in text
    assert {chart["name"] for chart in data["charts"]} >= {"loss", "memory"}
    for last in ("nan", "inf"):
        (run / "metrics.csv").write_text(f"step,train/seconds,train/loss\n1,1,1\n2,{last},{last}\n")
        assert "unknown" in page(run)[0]


@pytest.mark.parametrize("name", ["samples.jsonl", "spikes.jsonl", "mistakes.jsonl", "data.json", "environment.json"])
def test_deep_json_is_a_note(name: str, run: Path):
    for depth in (500, 100_000):
        deep = "[" * depth + "]" * depth
        row = {"step": 1, "prompt": 0, "text": 0, "loss": 0, "samples": 0, "evaluation": 0, "row": 1}
        row |= {"correct": 0, "predicted": 0}
        text = json.dumps(row).replace(": 0", f": {deep}") if name.endswith("l") else f'{{"command": {deep}}}'
        (run / name).write_text(text + "\n")
        page(run)
    assert name in page(run)[0]


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {k: v}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12))


@pytest.mark.parametrize(
    "content",
    [
        LAUGHS,
        MERGES,
        "a: &a [*a]\n",
        "a: &a {b: *a}\n",
        "a: &a {<<: *a}\n",
        "a: " + "[" * 300 + "]" * 300,
        "a: " + "[" * 100_000,
        "a: " + "9" * 5000,
        f"a: &a {'x' * 500_000}\nb: [{', '.join(['*a'] * 100)}]",
        "a: !!python/object/apply:os.mkdir [harmed]\n",
        "a: 1\na: 2\n",
        "\0",
    ],
    ids=["laughs", "merges", "list", "map", "merge", "deep", "deeper", "digits", "long", "object", "twice", "zero"],
)
def test_yaml_that_expands_has_no_end_or_is_none_is_refused(
    content: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(yaml.YAMLError):
        yaml_text.load(content)
    (run / "config.yaml").write_text(content)
    with pytest.raises(UserError, match="config.yaml") as refused:
        settings.read(str(run / "config.yaml"))
    assert len(str(refused.value)) < 1000 and "\n" not in str(refused.value)
    (run / "config.1.yaml").write_text(content)
    text, _ = page(run)
    assert "config.yaml is incomplete or damaged" in text and "config.1.yaml is incomplete or damaged" in text
    assert not (tmp_path / "harmed").exists()


def test_yaml_with_honest_aliases_is_read():
    assert yaml_text.load("a: &a {x: [1, 2]}\nb: *a\nc: {<<: *a, y: 3}\n") == {
        "a": {"x": [1, 2]},
        "b": {"x": [1, 2]},
        "c": {"x": [1, 2], "y": 3},
    }


@pytest.mark.slow
def test_huge_files_are_read_in_part(run: Path):
    line = json.dumps({"step": 1, "prompt": "p", "text": "t" * 1000}) + "\n"
    with open(run / "samples.jsonl", "w") as file:  # 100 MB
        for _ in range(100):
            file.write(line * (1_000_000 // len(line)))
        file.write(json.dumps({"step": 2, "prompt": "p", "text": "the last one"}) + "\n")
    block = "".join(f"{step},1.5\n" for step in range(100_000))
    with open(run / "metrics.csv", "w") as file:  # ten million rows
        file.write("step,train/loss\n" + block * 100 + "9999999,1.5\n")
    for name in ("config.1.yaml", "data.json", "results.csv"):
        (run / name).write_text("a: 1\n" * 3_000_000)
    with open(run / "environment.json", "wb") as file:
        file.truncate(1 << 42)  # without a block on the disk
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text, data = page(run)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KiB
    assert "the last one" in text and "samples.jsonl: only the last" in text and "metrics.csv: only the last" in text
    assert data["charts"][0]["lines"][0]["step"][-1] == 9_999_999
    for name in ("config.1.yaml", "data.json", "results.csv", "environment.json"):
        assert f"{name} is omitted" in text


@pytest.mark.slow
def test_a_page_of_hostile_tables_stays_small_and_is_escaped(run: Path):
    script = "<script>alert(1)</script>"
    cell = '"' + "x" * 200_000 + '"'
    (run / "metrics.csv").write_text("step,train/loss\n" + f"{cell},1\n1,{cell}\n2,2.5\n")
    wide = ",".join(f"val/{script}{i}" for i in range(5000))
    (run / "results.csv").write_text(f"label,f1\n{script},0.5\n{cell},1\n" + "a,0.5\n" * 100_000)
    names = ",".join(["right", *(f"{'l' * 10_000}{i}" for i in range(20))])
    rows = "".join(f"{script},{','.join(['²', '9' * 5000, '-1', *['7'] * 17])}\n" for i in range(20))
    (run / "confusion.csv").write_text(f"{names}\n{rows}")
    (run / "results.md").write_text(script + "y" * 1_000_000)
    samples = [{"step": i, "prompt": f"{script}{i}", "text": "z" * 50_000} for i in range(200)]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    mistake = {"evaluation": script, "row": 10**400, "loss": float("inf"), "text": script * 10_000}
    mistake |= {"correct": script, "predicted": ["x"]}
    (run / "mistakes.jsonl").write_text((json.dumps(mistake) + "\n") * 2000)
    (run / "spikes.jsonl").write_text((json.dumps({"step": 1, "loss": 1, "samples": [1] * 2000}) + "\n") * 2000)
    (run / "data.json").write_text(json.dumps({f"{script}{i}": script * 10 for i in range(10_000)}))
    for number in range(200):
        (run / f"config.{number}.yaml").write_text(f"a: {number}\n")
    text, data = page(run)
    assert script not in text and len(text) < 15_000_000
    assert data["charts"][0]["lines"][0]["value"] == [2.5]
    for note in (
        "metrics.csv: incomplete",
        "results.csv: incomplete",
        "180 of 200 earlier configs",
        "data.json: only its first",
    ):
        assert note in text
    (run / "metrics.csv").write_text(f"step,{wide}\n1{',1' * 5000}\n")
    assert len(page(run)[1]["charts"]) <= 200 and "4801 of 5001 columns" in page(run)[0]


def test_what_is_no_file_is_not_read(run: Path):
    os.mkfifo(run / "metrics.csv")
    (run / "samples.jsonl").symlink_to("/dev/zero")
    (run / "results.csv").mkdir()
    text, _ = page(run)
    for name in ("metrics.csv", "samples.jsonl", "results.csv"):
        assert f"{name} cannot be read (it is not a regular file)" in text


def test_a_link_to_a_file_of_mine_is_not_shown(run: Path, cli, tmp_path: Path):
    (tmp_path / "mine").write_text("step,secret\n1,2\n")
    (run / "metrics.csv").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="metrics.csv is a link"):
        cli("report", run, "--output", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
