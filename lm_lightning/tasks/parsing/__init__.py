"""Parsing."""

from lm_lightning.features import Feature

FEATURE = Feature(classes=("lm_lightning.tasks.parsing.data", "lm_lightning.tasks.parsing.model"))
