"""Run folders with damaged files: their report shows what can be read."""

import json
from pathlib import Path

import pytest
from hostile import Guard, attack, mutations

from lm_lightning.reports import history
from lm_lightning.reports.page import page


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with all the files that a report reads."""
    folder = tmp_path / "run"
    folder.mkdir()
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
    mistake = {"evaluation": "validation", "row": 3, "loss": 1.5, "text": "t", "correct": "a", "predicted": "b"}
    (folder / "mistakes.jsonl").write_text((json.dumps(mistake) + "\n") * 2)
    (folder / "data.json").write_text(json.dumps({"splits": {"train": {"tokens": 5}}, "files": ["a", "b"]}))
    (folder / "environment.json").write_text(json.dumps({"command": ["fit"], "git": {"commit": "a"}, "cores": 2}))
    return folder


@mutations(3000)
def test_reports_of_damaged_runs(run: Path, guard: Guard, tmp_path: Path, seeds: range):
    def read(folder: Path) -> None:
        text = page([history.read(folder)])
        data = text.split('type="application/json" id="data">')[1].split("</script>")[0]
        json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))

    attack(run, read, seeds, guard, tmp_path, refuses=False)
