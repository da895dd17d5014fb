"""A PyTorch Lightning project template for language models."""

__version__ = "0.1.0"
