"""BERT: masked language models."""
