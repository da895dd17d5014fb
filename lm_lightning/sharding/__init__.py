"""Networks that are distributed over processes: FSDP2, HSDP and tensor parallelism, with sharded checkpoints."""

from lm_lightning.features import Feature

FEATURE = Feature(
    classes=("lm_lightning.sharding.strategy",),
    checkpoint_folders=("lm_lightning.sharding.checkpoints",),
)
