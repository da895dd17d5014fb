"""The commands about tuning in docs/."""

from pathlib import Path

import pytest
import yaml
from reading import Reader, under


@pytest.mark.slow
@under("docs/tuning.md", "Tuning")
def test_tune(reader: Reader, typed: list[list[str]]):
    file = Path(next(words[words.index("--search") + 1] for words in typed if "--search" in words))
    space = yaml.safe_load(file.read_text(encoding="utf-8"))
    name = "model.optimizer.init_args.lr"
    file.write_text(yaml.safe_dump(space | {"trials": 2, "flags": {name: space["flags"][name]}}), encoding="utf-8")
    reader.type_all(typed)
    best = Path("runs") / "gpt-study" / "best.yaml"
    reader.run("fit", "--config", best, "--trainer.max_steps", 6)


@pytest.mark.slow
@under("docs/devices.md", "Verify your own config")
def test_verify(reader: Reader, typed: list[list[str]]):
    (out,) = reader.type_all(typed)
    assert "accumulate" in out
