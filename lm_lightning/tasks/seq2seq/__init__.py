"""Sequence to sequence: translation, summarization and other texts made from texts."""

from lm_lightning.features import Feature

FEATURE = Feature(classes=("lm_lightning.tasks.seq2seq.data", "lm_lightning.tasks.seq2seq.model"))
