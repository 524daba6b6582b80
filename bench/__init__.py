"""Benchmarks: `python -m bench`. Deleting this folder breaks nothing in `fastmmu`."""
