"""Readers of recorded streams."""

from fastmmu.trace.replay_file import TraceError, load_replay

__all__ = ["TraceError", "load_replay"]
