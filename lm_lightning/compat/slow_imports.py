"""Imports: most of torchmetrics, and with it scipy and matplotlib, is imported when it is used.

Lightning imports torchmetrics, which imports all its metrics of texts, images and sounds and their dependencies. This
takes a quarter of the time in which a command starts.
"""

import importlib
import logging
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, Optional

ROOT = "torchmetrics"
CORE = ("torchmetrics.utilities", "torchmetrics.metric", "torchmetrics.collections")  # in an order without cycles
NAMES = {"Metric": "torchmetrics.metric", "MetricCollection": "torchmetrics.collections"}
FUNCTIONS = "torchmetrics.functional"
PLOTS = "torchmetrics.utilities.plot"  # all metrics import it, for type hints and for a method `plot`


def defer() -> None:
    """Defers the import of most of torchmetrics, unless it is imported already.

    Alternative: none, Lightning imports all of torchmetrics.
    """
    if ROOT not in sys.modules and not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())


class Finder(MetaPathFinder):
    """Finds the modules whose execution is deferred."""

    def find_spec(
        self, name: str, path: Optional[Sequence[str]] = None, target: Optional[ModuleType] = None
    ) -> Optional[ModuleSpec]:
        if name not in (ROOT, FUNCTIONS, PLOTS):
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = Deferred(spec.loader, self)
        return spec


class Deferred(Loader):
    """Executes a module when a name is read from it that is not known without that.

    Args:
        loader: Loads the module.
        finder: The finder, which is removed if the core of torchmetrics cannot be imported without the rest.
    """

    def __init__(self, loader: Loader, finder: Finder) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> Optional[ModuleType]:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = lambda name: self.read(module, name)  # type: ignore[method-assign]
        if module.__name__ != ROOT:
            return
        vars(module)["_logger"] = logging.getLogger(ROOT)
        try:
            for name in CORE:
                importlib.import_module(name)
            vars(module).update({name: getattr(sys.modules[source], name) for name, source in NAMES.items()})
        except Exception:  # another version, in which they depend on more: import everything, as usual
            sys.meta_path.remove(self.finder)
            for name in [name for name in sys.modules if name.startswith(f"{ROOT}.")]:
                del sys.modules[name]
            del module.__getattr__
            self.loader.exec_module(module)

    def read(self, module: ModuleType, name: str) -> Any:
        """A value of a module that is not executed yet."""
        if name.startswith("__") and name not in ("__version__", "__all__"):
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        if module.__name__ == PLOTS and name.isupper():  # a type
            return object
        if module.__name__ == PLOTS and name.startswith("plot_"):
            return lambda *values, **options: self.execute(module, name)(*values, **options)
        return self.execute(module, name)

    def execute(self, module: ModuleType, name: str) -> Any:
        """Executes a module, if this was not done yet, and returns a value from it."""
        if vars(module).pop("__getattr__", None) is not None:
            self.loader.exec_module(module)
        return getattr(module, name)
