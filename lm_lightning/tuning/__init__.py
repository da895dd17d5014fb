"""Searches for good values of flags, and comparisons of ways to run a config."""

from lm_lightning.features import Feature

FEATURE = Feature(
    commands={
        "tune": ("lm_lightning.tuning.tune", "search good values of flags, a learning rate, the largest micro-batch"),
        "verify": ("lm_lightning.tuning.verify", "compare ways to run a config on this machine with a plain run"),
    },
    classes=("lm_lightning.tuning.range_test",),
)
