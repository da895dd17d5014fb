"""Imports go one way, so that tasks and optional features can be deleted; pyproject.toml has the contracts."""

import graphlib

import grimp
import pytest
from conftest import ROOT
from importlinter import cli as import_linter


def test_imports_keep_the_contracts(capsys: pytest.CaptureFixture):
    status = import_linter.lint_imports(str(ROOT / "pyproject.toml"), no_cache=True)
    assert status == import_linter.EXIT_STATUS_SUCCESS, capsys.readouterr().out


def test_no_modules_import_each_other_in_circles():
    graph = grimp.build_graph("lm_lightning", cache_dir=None)  # with the imports in functions
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imports) > 50
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names the modules
