"""Imports go one way, so that tasks and optional features can be deleted; pyproject.toml has the contracts."""

import graphlib
import subprocess
import sys

import grimp
from conftest import ROOT


def test_imports_keep_the_contracts():
    # In another process, as it configures logging: this closes the handlers of this one, and with them, after absl was
    # imported, the output that pytest captures.
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--config", ROOT / "pyproject.toml", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_modules_import_each_other_in_circles():
    graph = grimp.build_graph("lm_lightning", cache_dir=None)  # with the imports in functions
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imports) > 50
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names the modules
