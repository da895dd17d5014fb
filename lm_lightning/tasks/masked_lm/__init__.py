"""BERT: masked language models."""

from lm_lightning.features import Feature

FEATURE = Feature(classes=("lm_lightning.tasks.masked_lm.data", "lm_lightning.tasks.masked_lm.model"))
