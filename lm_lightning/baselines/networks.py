"""The types of networks `awd_lstm`, `gated_cnn` and `ngram`.

Importing this module registers them with `transformers`, so that `AutoModelForCausalLM.from_pretrained` loads exports
of them, without remote code.
"""

from lm_lightning import features

features.register_networks()
