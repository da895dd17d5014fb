"""LightningModules: batches in, losses and predictions out."""
