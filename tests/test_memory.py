"""Freed memory is kept, so that the next step does not get new pages from the system."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from lm_lightning.memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    return sum(torch.ones(size << 20).sum() for size in (30, 20, 10))  # megabytes times 4

for _ in range(5):
    step()
before = faults()
for _ in range(5):
    step()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs the C library of GNU")
def test_steps_with_tensors_of_the_same_sizes_have_no_page_faults():
    kept, returned = (
        int(subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True).stdout.split()[-1])
        for how in ("kept", "returned")
    )
    assert 5 * kept < returned and returned > 100_000
