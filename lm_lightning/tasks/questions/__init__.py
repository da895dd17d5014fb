"""Question answering."""

from lm_lightning.features import Feature

FEATURE = Feature(classes=("lm_lightning.tasks.questions.data", "lm_lightning.tasks.questions.model"))
