"""LoRA."""

from lm_lightning.features import Feature

FEATURE = Feature(classes=("lm_lightning.lora.lora",))
