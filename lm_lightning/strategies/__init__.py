"""Strategies: what `--trainer.strategy` names, each with what language models need already right.

A strategy says where the weights, the data and the work lie. The models know nothing of it, and a run has the same
losses under each. Lightning's own `auto`, `ddp` and `ddp_spawn` are used as they are.
"""

from lightning.pytorch.strategies import StrategyRegistry

from lm_lightning.strategies.sharded import FSDP2, TensorParallel

# name -> strategy, its settings and what it does
PRESETS = {
    "fsdp2": (FSDP2, {}, "weights, gradients and optimizer sharded over all processes"),
    "hsdp": (FSDP2, {"within_node": True}, "sharded over the processes of a node, repeated on each node"),
    "tp": (TensorParallel, {}, "each matrix split over the processes of a node, which share their batches"),
}
for name, (strategy, settings, description) in PRESETS.items():
    StrategyRegistry.register(name, strategy, description=description, override=True, **settings)
