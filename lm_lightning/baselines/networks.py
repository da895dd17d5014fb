"""The types of networks `awd_lstm`, `gated_cnn` and `ngram`.

Importing this module registers them with `transformers`, so that `AutoModelForCausalLM.from_pretrained` loads exports
of them, without remote code.
"""

from lm_lightning.baselines.cnn import GatedCNNConfig, GatedCNNForCausalLM
from lm_lightning.baselines.lstm import AWDLSTMConfig, AWDLSTMForCausalLM
from lm_lightning.baselines.ngram import NGramConfig, NGramForCausalLM

__all__ = ["AWDLSTMConfig", "AWDLSTMForCausalLM", "GatedCNNConfig", "GatedCNNForCausalLM"]
__all__ += ["NGramConfig", "NGramForCausalLM"]

for network in (AWDLSTMForCausalLM, GatedCNNForCausalLM, NGramForCausalLM):
    network.register()
