"""Protection against untrusted files, and of secrets."""
