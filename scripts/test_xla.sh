#!/usr/bin/env bash
# Tests XLA on the CPU, in a separate environment, since torch_xla needs a specific version of torch. Needs 8 GB of disk
# space; less with torch's CPU wheels, whose URL can be given by PIP_EXTRA_INDEX_URL.
set -e
cd "$(dirname "$0")/.."
environment=${1:-.venv-xla}
[ -d "$environment" ] || python3 -m venv "$environment"
. "$environment/bin/activate"
pip install -q -e ".[tpu,test]"
PJRT_DEVICE=CPU pytest tests/xla tests/models/test_nonfinite.py
