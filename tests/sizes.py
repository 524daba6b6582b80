"""How much of a test runs: the interpreter is about 200 times slower than compiled code, so it gets a sample."""

from __future__ import annotations

from fastmmu._jit import JIT


def sized(compiled: int, interpreted: int) -> int:
    """Count for this build."""
    return compiled if JIT else interpreted
