"""Compression of finished models: a `from_pretrained` folder in, one of a smaller or faster model out."""

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
