"""Baselines: recurrent, convolutional and n-gram language models, with which transformers can be compared.

`import lm_lightning.baselines.networks` makes `transformers` load their exports. (This module is imported at the start
of each command, and therefore does not import `transformers`.)
"""

from lm_lightning.features import Feature

FEATURE = Feature(
    classes=("lm_lightning.baselines.networks", "lm_lightning.baselines.counting"),
    networks={
        "AWDLSTMForCausalLM": "lm_lightning.baselines.lstm.AWDLSTMForCausalLM",
        "GatedCNNForCausalLM": "lm_lightning.baselines.cnn.GatedCNNForCausalLM",
        "NGramForCausalLM": "lm_lightning.baselines.ngram.NGramForCausalLM",
    },
)
