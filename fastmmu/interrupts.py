"""Ctrl-C in a command: one line and exit status 130, whatever the command is doing.

Usually that is a KeyboardInterrupt, so that `finally` clauses do their work. It would get lost, with noise, inside a callback from
C, and a compiler has many; and threads that take turns would be left in the middle of one. There the process ends at once: neither
has anything to put right but the cursor, which a progress bar hides. This module imports nothing that takes long.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

COMPILERS = ("llvmlite", "numba")
INTERRUPTED = 130
SHOW_CURSOR = "\x1b[?25h"


def compiling(frame: FrameType | None) -> bool:
    """Whether the compiler is at work below `frame`."""
    while frame is not None:
        if frame.f_globals.get("__name__", "").split(".")[0] in COMPILERS:
            return True
        frame = frame.f_back
    return False


def end_at_once(signum: int, frame: FrameType | None) -> NoReturn:
    """The process ends here."""
    line = "interrupted\n" if not sys.stderr.isatty() else f"{SHOW_CURSOR}interrupted\n"
    os.write(2, line.encode())
    os._exit(INTERRUPTED)


def stop(signum: int, frame: FrameType | None) -> None:
    """A KeyboardInterrupt where it would not get lost."""
    if compiling(frame):
        end_at_once(signum, frame)
    raise KeyboardInterrupt


@contextmanager
def interruptible(whole_process: bool) -> Iterator[None]:
    """For the time of the block, Ctrl-C is what the module says; if it is the whole process, it may end it at once afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # see restart
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, end_at_once if whole_process else before)


def restart(command: list[str], environment: dict[str, str]) -> NoReturn:
    """Another program takes the place of this one; Ctrl-C waits until it is `interruptible`."""
    sys.stdout.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    os.execve(command[0], command, environment)
