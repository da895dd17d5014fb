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

    import data
    import generation  # fork: gpt
    import startup
    import training
    from jsonargparse import auto_cli

    from lm_lightning.compat.torch import hide_messages
    from lm_lightning.errors import UserError

    hide_messages()
    try:
        kinds = [training.throughput, training.time_to_loss, training.overhead]
        kinds += [startup.startup, data.data]
        kinds += [generation.generate]  # fork: gpt
        auto_cli(kinds, prog="python scripts/bench", as_positional=False)
    except UserError as error:
        sys.exit(f"error: {error}")
