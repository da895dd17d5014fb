"""The command line: options, config files, messages, help."""
