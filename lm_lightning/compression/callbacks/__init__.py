"""Compression while training."""
