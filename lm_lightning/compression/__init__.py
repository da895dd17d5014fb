"""Compression of finished models: a `from_pretrained` folder in, one of a smaller or faster model out."""
