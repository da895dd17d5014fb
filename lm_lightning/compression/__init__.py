"""Compression: makes trained models in `from_pretrained` folders smaller or faster."""

from lm_lightning.features import Feature

FEATURE = Feature(
    commands={
        "compress": ("lm_lightning.compression.compress", "quantize, prune or convert a model, and measure the result"),
    },
    classes=(
        "lm_lightning.compression.callbacks.distillation",
        "lm_lightning.compression.callbacks.pruning",
        "lm_lightning.compression.callbacks.quantization",
        "lm_lightning.compression.callbacks.structured_pruning",
    ),
)
