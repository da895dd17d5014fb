"""Training on TPUs with torch_xla."""

from lm_lightning.features import Feature

FEATURE = Feature(
    classes=("lm_lightning.xla.strategy",),
    trainer_settings=("lm_lightning.xla.strategy.complete_settings",),
)
