"""Measures the speed of this project, and compares it with a peer: `python scripts/bench KIND --help`.

See docs/speed.md.
"""

import os
import sys

if __name__ == "__main__":
    import harness

    sys.path.insert(0, str(harness.ROOT))
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    os.environ["HF_HUB_OFFLINE"] = "1"

    import training
    from jsonargparse import auto_cli

    from lm_lightning.errors import UserError

    try:
        auto_cli([training.throughput, training.overhead], prog="python scripts/bench", as_positional=False)
    except UserError as error:
        sys.exit(f"error: {error}")
