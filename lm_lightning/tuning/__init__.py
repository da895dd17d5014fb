"""Searches for good values of flags, and comparisons of different ways to run a config."""

from lm_lightning.features import Feature

FEATURE = Feature(
    commands={
        "tune": (
            "lm_lightning.tuning.tune",
            "search for hyperparameters, a learning rate or a batch size",
        ),
        "verify": (
            "lm_lightning.tuning.verify",
            "check that all strategies on this machine give the same losses",
        ),
    },
    classes=("lm_lightning.tuning.range_test",),
)
