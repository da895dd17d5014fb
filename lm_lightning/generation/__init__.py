"""Text generation."""

from lm_lightning.features import Feature

FEATURE = Feature(
    commands={
        "generate": ("lm_lightning.generation.generate", "continue prompts with a trained model, or chat"),
    },
    classes=("lm_lightning.generation.samples", "lm_lightning.generation.scores"),
)
