"""Commands that do not train. Each is a typed function in a file of its own."""
