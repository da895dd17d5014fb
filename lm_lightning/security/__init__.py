"""Foreign files and secrets."""
