"""What this project uses of other libraries beside their public API, a module for each library.

Each function or constant here gives the reason and the public alternative that was considered, and has a test in
tests/compat that fails when the library changes. Optional features have a `compat.py` in their own folder.
"""
