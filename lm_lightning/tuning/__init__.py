"""Searches of good options, and comparisons of ways to run a config."""
