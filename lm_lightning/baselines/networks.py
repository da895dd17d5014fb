"""The types of networks `awd_lstm` and `gated_cnn`.

Importing this module registers them with `transformers`, so that `AutoModelForCausalLM.from_pretrained` loads exports
of them, without remote code.
"""

from lm_lightning.baselines.cnn import GatedCNNConfig, GatedCNNForCausalLM
from lm_lightning.baselines.lstm import AWDLSTMConfig, AWDLSTMForCausalLM

__all__ = ["AWDLSTMConfig", "AWDLSTMForCausalLM", "GatedCNNConfig", "GatedCNNForCausalLM"]

for network in (AWDLSTMForCausalLM, GatedCNNForCausalLM):
    network.register()
