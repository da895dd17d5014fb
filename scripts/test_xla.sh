#!/usr/bin/env bash
# Tests XLA on the CPU, in an environment of its own, as torch_xla needs its own torch. 8 GB of disk.
# PIP_EXTRA_INDEX_URL can point to torch's CPU wheels, which are smaller.
set -e
cd "$(dirname "$0")/.."
environment=${1:-.venv-xla}
[ -d "$environment" ] || python3 -m venv "$environment"
. "$environment/bin/activate"
pip install -q -e ".[tpu,test]"
PJRT_DEVICE=CPU pytest tests/xla tests/models/test_nonfinite.py
