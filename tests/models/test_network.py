"""What we need of networks beside their forward pass."""

import torch

from lm_lightning.models.network import gradient_norm


def test_gradient_norm_is_right_for_large_tensors():
    """PyTorch's own, on a CPU, is off by more than 1e-4 here."""
    generator = torch.Generator().manual_seed(1)
    parameters = [torch.zeros(20_000, 256), torch.zeros(7), torch.zeros(3, 4, 5)]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 1e-3
    expected = sum(p.grad.double().square().sum() for p in parameters).sqrt().item()
    assert abs(gradient_norm(parameters).item() / expected - 1) < 1e-6
