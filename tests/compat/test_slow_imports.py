import subprocess
import sys

import pytest

# In a new process, as this one has imported everything
PROGRAM = """
import sys
from lm_lightning.compat import slow_imports
slow_imports.defer()
import torchmetrics
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
assert issubclass(MulticlassAccuracy, Metric) and issubclass(torchmetrics.MetricCollection, torch.nn.Module)
found = {"scipy.signal", "matplotlib.pyplot", "torchmetrics.text"} & sys.modules.keys()
assert not found, found
assert torchmetrics.functional.mean_squared_error(torch.zeros(2), torch.ones(2)) == 1
assert issubclass(torchmetrics.MeanMetric, Metric)
accuracy = MulticlassAccuracy(2)
accuracy.update(torch.tensor([0, 1]), torch.tensor([0, 1]))
if torchmetrics.utilities.imports._MATPLOTLIB_AVAILABLE:
    figure, axes = accuracy.plot()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "other", ["", "slow_imports.CORE += ('torchmetrics.nothing',)"], ids=["as is", "other version"]
)
def test_torchmetrics_is_imported_when_it_is_used(other):
    """Nothing of it is missing, also with a version whose core cannot be imported by itself."""
    program = "import torch" + PROGRAM.replace("slow_imports.defer()", f"{other}\nslow_imports.defer()")
    if other:
        program = program.replace("assert not found, found", "assert found")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
