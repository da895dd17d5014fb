"""Filters of corpora: duplicates, quality rules, language, overlap with other texts, personal data."""

from lm_lightning.features import Feature

FEATURE = Feature(
    data_classes=(
        "lm_lightning.filters.duplicates",
        "lm_lightning.filters.language",
        "lm_lightning.filters.near_duplicates",
        "lm_lightning.filters.overlap",
        "lm_lightning.filters.personal",
        "lm_lightning.filters.quality",
        "lm_lightning.filters.repetition",
    ),
)
