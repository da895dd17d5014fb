"""Every command of the README and of the pages in docs/ is run as it stands, see `reading`.

The pages of features are read by the tests of these features.
"""

import inspect
import math
import re

import pytest
from conftest import ROOT
from lightning.pytorch.callbacks import ModelCheckpoint
from reading import PAGES, Reader, commands, in_a_process, is_run, under


def test_every_command_is_run_by_a_test_or_has_a_reason_not_to():
    sources = [file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py")]
    read = {match for source in sources for match in re.findall(r'^@under\("(.*?)", "(.*?)"\)', source, re.M)}
    for page in PAGES:
        for heading, found in commands(page).items():
            assert (page, heading) in read or not any(map(is_run, found)), (page, heading)


@pytest.mark.parametrize("page", [*PAGES, "SECURITY.md"])
def test_links_lead_somewhere(page: str):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (ROOT / page).parent.joinpath(link).exists(), link


def test_options_of_the_pages_exist():
    sources = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "lm_lightning").rglob("*.py"))
    sources += str(inspect.signature(ModelCheckpoint))
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for option in set(re.findall(r"--(?:model|data|best|last|predictions)\.([a-z_.]+[a-z_])", text)):
            for name in option.split("."):
                assert re.search(rf"\b{name}\b", sources), (page, option)


@under("README.md", "Quick start")
def test_first_command(reader: Reader, typed: list[list[str]]):
    reader.type_all(typed)
    reader.validate()


@under("README.md", "Your own text")
def test_own_text(reader: Reader, typed: list[list[str]]):
    reader.type_all(typed)
    reader.validate()


@under("docs/data.md", "Text files and data")
def test_data(reader: Reader, typed: list[list[str]]):
    outs = reader.type_all(typed)
    assert outs[1].startswith("--- sample 17") and "<|endoftext|>" in outs[1]


@under("docs/mixtures.md", "Mixtures of corpora")
def test_mixtures(reader: Reader, typed: list[list[str]]):
    outs = reader.type_all(typed)
    assert "from 80 % of the training: docs 50.0 %, python 50.0 %" in outs[0]
    assert reader.logged("val/docs/bits_per_byte") and reader.logged("corpora/docs/share")
    reader.validate()


@under("docs/pretraining.md", "GPT")
def test_pretraining(reader: Reader, typed: list[list[str]]):
    reader.type_all(typed)


@under("docs/configuration.md", "Configuration")
def test_configuration(reader: Reader, typed: list[list[str]]):
    reader.run = in_a_process
    (out,) = reader.type_all(typed)
    assert "class_path: lm_lightning.models.gpt.CausalLM" in out


@under("docs/evaluation.md", "Evaluation and prediction")
@pytest.mark.slow
def test_evaluation(reader: Reader, typed: list[list[str]]):
    reader.type_all(typed)
    assert all(math.isfinite(row["loss"]) for row in reader.predictions())
    names = [path.name.rpartition("-")[2] for path in (reader.fitted[-1] / "evaluations").iterdir()]
    assert sorted(names) == ["predict", "test", "validate"]


@under("docs/checkpoints.md", "Run folders, checkpoints and resuming")
@pytest.mark.slow
def test_run_folder_and_resuming(reader: Reader, typed: list[list[str]]):
    first, second = typed
    reader.type(first)
    tree = (ROOT / "docs/checkpoints.md").read_text(encoding="utf-8").split("```text")[1].split("```")[0]
    for name in re.findall(r"^  ([\w.]+)", tree, re.M):
        found = (reader.fitted[-1] / name).exists()
        assert found or name == "evaluations", name
    reader.known["800"] = "8"  # steps
    reader.type(second)
    assert reader.fitted[0] == reader.fitted[1] and max(reader.logged("step")) >= 7


@pytest.mark.slow
@under("docs/devices.md", "Many devices")
def test_many_devices(reader: Reader, typed: list[list[str]]):
    reader.run = in_a_process
    reader.known["8"] = "2"  # devices
    reader.type_all(typed)
