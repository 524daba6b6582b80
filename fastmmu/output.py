"""Where commands write: results to the standard output, all else to the standard error. Colour and progress: on terminals only."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

BAD_INPUT = 2
"""The exit status of every command for what it cannot read."""
PIPE_WIDTH = 1 << 16  # off a terminal no line is cut or folded


def open_closed_streams() -> None:
    """What is written to an output that was closed by whoever started this goes nowhere; Python has None in its place."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            setattr(sys, name, open(nowhere, "w", encoding="utf-8", closefd=False))  # noqa: SIM115


def complain(message: object) -> None:
    """One line on the standard error output."""
    print(f"error: {message}", file=sys.stderr)


def progress_console() -> Console:
    """Where progress goes."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def result_console() -> Console:
    """Where tables and trees go. A reader that has gone raises BrokenPipeError, as it does for `print`."""
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return Output(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
