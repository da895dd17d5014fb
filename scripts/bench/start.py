"""Measures the time that commands need to print their help: the median of five new processes.

python scripts/bench/start.py
"""

import statistics
import subprocess
import sys
import time

COMMANDS = ["--help", "prepare --help", "generate --help", "export --help", "fit --help"]

for command in COMMANDS:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "lm_lightning", *command.split()], stdout=subprocess.DEVNULL, check=True)
        seconds.append(time.perf_counter() - start)
    print(f"{command:20}{statistics.median(seconds):6.2f} s")
