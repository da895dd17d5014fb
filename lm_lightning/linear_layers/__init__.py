"""The linear layers of networks, for the features that adapt or compress them."""
