"""GPT: causal language models."""
