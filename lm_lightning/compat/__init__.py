"""Everything that this project uses of other libraries outside of their public APIs, one module per library.

The docstring of each function or constant has the reason and the public alternative that was considered; a test in
tests/compat fails when the library changes. Optional features have a `compat.py` in their own folder.
"""
