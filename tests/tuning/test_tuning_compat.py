"""What tuning expects of the messages of PyTorch."""

import subprocess
import sys

import torch

from lm_lightning.tuning.find import OUT_OF_MEMORY


def test_memory_that_is_not_enough_is_recognized():
    code = "import torch\ntorch.empty(1 << 60, dtype=torch.uint8)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and OUT_OF_MEMORY.search(done.stderr)
    assert OUT_OF_MEMORY.search(f"{torch.OutOfMemoryError.__name__}: CUDA out of memory.")
    assert not OUT_OF_MEMORY.search("RuntimeError: mat1 and mat2 shapes cannot be multiplied")
