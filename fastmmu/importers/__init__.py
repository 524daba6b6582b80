"""Traces and memory images of other tools, made into the files that this package reads: `docs/trace-import.md`."""
