"""Preference tuning."""

from lm_lightning.features import Feature

FEATURE = Feature(
    classes=(
        "lm_lightning.tasks.preference.data",
        "lm_lightning.tasks.preference.model",
        "lm_lightning.tasks.preference.objectives",
    )
)
