"""The registry finds what each task and optional feature adds, and explains what is wrong with it."""

import importlib
import pkgutil
import re

import pytest
from conftest import ROOT, needs, optional

import lm_lightning
from lm_lightning import features
from lm_lightning.errors import UserError


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch):
    """Registers more packages."""

    def register(*names: str) -> None:
        monkeypatch.setattr(features, "FEATURES", (*features.FEATURES, *names))
        features.features.cache_clear()

    yield register
    features.features.cache_clear()


def test_each_package_with_a_feature_is_registered():
    found = pkgutil.walk_packages(lm_lightning.__path__, "lm_lightning.")
    packages = [importlib.import_module(module.name) for module in found if module.ispkg]
    own = {package.__name__.removeprefix("lm_lightning.") for package in packages if hasattr(package, "FEATURE")}
    assert own == set(features.FEATURES)


@pytest.mark.parametrize("name", features.FEATURES)
def test_each_import_path_of_a_feature_exists(name: str):
    feature = features.features()[name]
    for module, summary in feature.commands.values():
        assert callable(importlib.import_module(module).main) and summary
    for module in feature.classes:
        importlib.import_module(module)
    for path in (*feature.callbacks, *feature.trainer_settings):
        assert callable(features.resolve(path))


def test_the_callbacks_of_the_readme_can_be_chosen_by_their_short_names():
    chosen = [*features.CORE, *(module for feature in features.features().values() for module in feature.classes)]
    chosen += [path.rpartition(".")[0] for feature in features.features().values() for path in feature.callbacks]
    known = {name for module in chosen for name in vars(importlib.import_module(module))}
    table = (ROOT / "README.md").read_text().partition("| `--trainer.callbacks+=` |")[2].partition("\n\n")[0]
    named = {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split(" | ")[0])}
    assert "NoDropout" in named and named - known == {"EarlyStopping"}  # which is Lightning's


def test_a_deleted_folder_whose_line_stays_is_explained(cli, registered):
    registered("tasks.deleted")
    with pytest.raises(UserError, match=r"no package lm_lightning\.tasks\.deleted.*remove its line"):
        cli("prepare", "--help")


def test_a_package_without_a_feature_is_explained(registered):
    registered("data")
    with pytest.raises(UserError, match=re.escape("lm_lightning.data has no FEATURE in its __init__.py")):
        features.commands()


def test_a_package_that_a_feature_lacks_is_no_deleted_folder(registered, tmp_path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "broken.py").write_text("import surely_not_installed\n")
    monkeypatch.setattr(lm_lightning, "__path__", [*lm_lightning.__path__, str(tmp_path)])
    registered("broken")
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed"):
        features.commands()


@needs("diagnostics")
def test_a_callback_that_the_options_have_is_not_added_again():
    spikes = optional("diagnostics.spikes.Spikes")
    kinds = [type(callback) for callback in features.callbacks()]
    assert spikes in kinds
    kinds.remove(spikes)
    assert [type(callback) for callback in features.callbacks([spikes(deviations=3.0)])] == kinds
