"""Experiment tracking with Weights & Biases."""

from lm_lightning.features import Feature

FEATURE = Feature(classes=("lm_lightning.tracking.weights_and_biases",))
