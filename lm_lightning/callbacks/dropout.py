"""Switches dropout off, so that runs can be compared."""

from lightning.pytorch import Callback, LightningModule, Trainer


class NoDropout(Callback):
    """Sets every dropout probability of the network to 0, whether the network is new or pretrained.

    Processes and micro-batches drop different units, so runs that split their batches differently are equal only
    without dropout. The network stays in training mode, which activation checkpointing needs.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Networks keep probabilities in their dropout layers, in numbers for fused attention, and in their config.
        for holder in (pl_module.network.config, *pl_module.network.modules()):
            layer = "drop" in type(holder).__name__.lower()
            for name, value in list(vars(holder).items()):
                if isinstance(value, float) and ("drop" in name or (layer and name == "p")):
                    setattr(holder, name, 0.0)
