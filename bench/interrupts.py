"""Interruptions: Ctrl-C and the terminating signals become one exception, and none gets lost.

An exception raised by a signal handler vanishes, with noise, when the signal comes inside a callback from C, and a compiler has
many. So a signal that comes while something compiles is only remembered; `checkpoint` raises it between two pieces of work. So is
one that comes while a process is started, which nobody would know of yet.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

COMPILERS = ("llvmlite", "numba")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal asked this process to end; `status` is the exit status that says so."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.status = 128 + signum


_pending: list[int] = []
_held: list[bool] = []


@contextmanager
def held() -> Iterator[None]:
    """Signals are only remembered while the block runs; a `checkpoint` behind it raises them."""
    _held.append(True)
    try:
        yield
    finally:
        _held.pop()


def _compiling(frame: FrameType | None) -> bool:
    """Whether the compiler is at work below `frame`."""
    while frame is not None:
        if frame.f_globals.get("__name__", "").split(".")[0] in COMPILERS:
            return True
        frame = frame.f_back
    return False


def _stop(signum: int, frame: FrameType | None) -> None:
    _pending.append(signum)
    if not _held and not _compiling(frame):
        raise Interrupted(signum)


def install() -> None:
    """Turn the signals into `Interrupted`, so that `finally` clauses stop workers and remove temporary files."""
    for signum in SIGNALS:
        signal.signal(signum, _stop)


def checkpoint() -> None:
    """Raise for a signal that was only remembered.

    Raises:
        Interrupted: a signal has come.
    """
    if _pending:
        raise Interrupted(_pending[0])
