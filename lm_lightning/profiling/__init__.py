"""Profiles of training steps."""

from lm_lightning.features import Feature

FEATURE = Feature(classes=("lm_lightning.profiling.profile",))
