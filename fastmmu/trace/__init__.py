"""Readers of recorded streams and snapshots."""

from fastmmu.trace.npz import TraceError
from fastmmu.trace.replay_file import load_replay
from fastmmu.trace.snapshot import Snapshot, load_snapshot

__all__ = ["Snapshot", "TraceError", "load_replay", "load_snapshot"]
