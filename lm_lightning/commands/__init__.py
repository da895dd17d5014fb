"""Commands that do not train: typed functions, one file a command."""
