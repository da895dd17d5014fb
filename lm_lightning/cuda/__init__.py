"""Kernels for NVIDIA GPUs: matrix products in 8-bit floating point, and those of Liger."""

from lm_lightning.features import Feature

FEATURE = Feature(classes=("lm_lightning.cuda.float8", "lm_lightning.cuda.liger"))
