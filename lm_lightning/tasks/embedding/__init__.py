"""Sentence embeddings and semantic search."""

from lm_lightning.features import Feature

FEATURE = Feature(
    commands={
        "search": ("lm_lightning.tasks.embedding.search", "find the texts nearest to a query"),
    },
    classes=("lm_lightning.tasks.embedding.data", "lm_lightning.tasks.embedding.model"),
)
