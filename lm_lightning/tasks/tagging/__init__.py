"""Tagging."""

from lm_lightning.features import Feature

FEATURE = Feature(
    classes=(
        "lm_lightning.tasks.tagging.data",
        "lm_lightning.tasks.tagging.model",
        "lm_lightning.tasks.tagging.roles",
    ),
)
