"""Configs of any shape: `fit` runs, or refuses them in one sentence."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from lm_lightning.errors import UserError

ODD = st.one_of(
    st.sampled_from([-1, 0, 10**12, 1.5, float("nan"), float("inf"), -1e300, True, None]),
    st.sampled_from(["", "é☃", "none", "1e3", "[1, 2", "../..", "\0x", [], [1], {}, {"a": 1}, [[]]]),
    st.text(max_size=5),
)
# These start processes, compile, read or write elsewhere, make the run as long as it says, or are torch's own affair.
LEFT_OUT = {"devices", "num_nodes", "num_workers", "compile", "max_steps", "max_epochs", "differentiable"}
LEFT_OUT |= {"dirpath", "save_dir", "paths", "validation_paths", "test_paths"}


def places(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where the options of a config are, those of a section and the section itself."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if key not in LEFT_OUT and not key.endswith("_dir"):
            yield (*path, key)
            yield from places(value, (*path, key))


@pytest.fixture
def config(fit: Callable[..., Path]) -> dict[str, Any]:
    """All options of a run of two steps."""
    flags = ("--trainer.max_steps", 2, "--model.schedule.warmup_steps", 1, "--trainer.limit_val_batches", 1)
    return yaml.safe_load((fit(*flags) / "config.yaml").read_text())


@pytest.mark.slow
def test_any_option_may_be_anything(cli: Callable[..., str], config: dict[str, Any], tmp_path: Path):
    everywhere, file = sorted(set(places(config))), tmp_path / "fuzz.yaml"
    ends = {"runs": 0, "refused": 0}

    @seed(1)
    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(place=st.sampled_from(everywhere), value=ODD, unknown=st.booleans())
    def run(place: tuple[str, ...], value: Any, unknown: bool) -> None:
        node = changed = copy.deepcopy(config)
        for key in place[:-1]:
            node = node[key]
        node[place[-1] + "x" * (unknown and len(place) % 2)] = value
        file.write_text(yaml.safe_dump(changed, allow_unicode=True), encoding="utf-8")
        try:
            cli("fit", "--config", file)
            ends["runs"] += 1
        except UserError as error:
            assert "\n" not in str(error)
            ends["refused"] += 1

    run()
    assert ends["refused"] > 20


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--data.tokenizer.vocab_size", 10**12), "must be 10,000,000 or less"),
        (("--model.network.n_positions", "many"), "n_positions"),
        (("--name", "a\0b"), "cannot be the name of a file"),
    ],
)
def test_what_fuzzing_has_found_is_refused(fit: Callable[..., Path], flags: tuple, reason: str):
    with pytest.raises(UserError) as refused:
        fit(*flags)
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("trainer.max_steps", ("trainer",)),
        ("best.save_top_k", ("best",)),
        ("data.batch_size", ("data", "init_args")),
        ("data.corpus.document", ("data", "init_args", "corpus")),
        ("model.schedule.min_lr_ratio", ("model", "init_args", "schedule")),
        ("model.optimizer.weight_decay", ("model", "init_args", "optimizer", "init_args")),
    ],
)
def test_null_in_a_file_is_refused_where_it_means_nothing(cli, recipe: Path, name: str, place: tuple[str, ...]):
    content = node = yaml.safe_load(recipe.read_text())
    for key in place:
        node = node.setdefault(key, {})
    node[name.rpartition(".")[2]] = None
    recipe.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=f"{name} is null"):
        cli("fit", "--config", recipe)


def test_null_is_refused_where_a_base_class_says_what_is_meant(cli, recipe: Path):
    content = yaml.safe_load(recipe.read_text())
    content["model"]["init_args"]["schedule"] = {"decay_ratio": None}
    recipe.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="model.schedule.decay_ratio is null"):
        cli("fit", "--config", recipe)


def test_data_of_no_class_are_refused(cli: Callable[..., str], recipe: Path):
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"data": {}}))
    with pytest.raises(UserError, match="data has no class_path"):
        cli("fit", "--config", recipe)


@pytest.mark.parametrize("section", [[], 1.5, "\0x"])
def test_a_section_that_is_none_is_refused(cli: Callable[..., str], recipe: Path, section: Any):
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"trainer": section}))
    with pytest.raises(UserError):
        cli("fit", "--config", recipe)
