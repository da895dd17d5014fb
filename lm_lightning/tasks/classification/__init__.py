"""Classification."""

from lm_lightning.features import Feature

FEATURE = Feature(classes=("lm_lightning.tasks.classification.data", "lm_lightning.tasks.classification.model"))
