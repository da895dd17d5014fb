"""Instruction tuning: trains a causal language model to answer."""

from lm_lightning.features import Feature

FEATURE = Feature(classes=("lm_lightning.tasks.instruction.data", "lm_lightning.tasks.instruction.model"))
