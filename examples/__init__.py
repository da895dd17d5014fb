"""Additions from outside of the package, each chosen by its class path: see docs/extending.md."""
