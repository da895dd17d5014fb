"""Compression during training."""
