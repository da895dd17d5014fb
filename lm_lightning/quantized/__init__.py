"""What the features that quantize linear layers share."""
