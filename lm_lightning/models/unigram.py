"""Makes a new causal network predict tokens with their frequencies in the training data, before it has learned more."""

import numpy as np
import torch
import transformers
from torch import Tensor, nn

BIAS = 0.5  # each element of the bias of the last norm


@torch.no_grad()
def start_at_frequencies(network: transformers.PreTrainedModel, counts: np.ndarray) -> bool:
    """Changes the head of a new network so that its logits are the logarithms of the tokens' frequencies.

    If the head has no bias, the bias of the last layer norm takes its place: all elements of the bias become equal, and
    the logarithms are added to the rows of the head, all elements of a row alike. This affects nothing else, as the
    output of a layer norm, before its bias, is orthogonal to the vector of ones; for the same reason, tied embeddings
    have no effect on the layers.

    Args:
        network: A new network, with a head without rows for other things than tokens.
        counts: How often each token occurs in the training data, (tokens,) int64.

    Returns:
        Whether it was possible: a head without a bias needs a layer norm with a bias right before it.
    """
    head = network.get_output_embeddings()
    logarithms = torch.from_numpy(np.log((counts + 1.0) / (counts + 1.0).sum())).float().to(head.weight.device)
    offsets = torch.zeros(len(head.weight), device=head.weight.device)
    offsets[: len(counts)] = logarithms - logarithms.mean()
    if head.bias is not None:
        head.bias += offsets.to(head.bias.dtype)
        return True
    norms = [module for module in network.modules() if isinstance(module, nn.LayerNorm) and module.bias is not None]
    if not norms or norms[-1].normalized_shape != head.weight.shape[1:]:
        return False
    bias = norms[-1].bias
    before, weight, old = logits(network), head.weight.clone(), bias.clone()
    head.weight += (offsets / (BIAS * len(bias))).unsqueeze(1) - weight.mean(1, keepdim=True)
    bias.fill_(BIAS)
    if torch.allclose(logits(network) - before, offsets, atol=1e-2):
        return True
    head.weight.copy_(weight)
    bias.copy_(old)
    return False


def logits(network: transformers.PreTrainedModel) -> Tensor:
    """The logits of a few tokens, (B, T, V) float32."""
    training = network.training
    tokens = torch.arange(4, device=network.device).unsqueeze(0)
    try:
        return network.eval()(input_ids=tokens, use_cache=False).logits.float()
    finally:
        network.train(training)
