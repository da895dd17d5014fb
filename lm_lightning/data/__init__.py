"""Converts text files to batches of tokens."""
