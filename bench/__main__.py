"""`python -m bench`: check every cell against the reference, time it in interleaved rounds, print tables, keep the files."""

from __future__ import annotations

import os
import sys

from bench.interrupts import Interrupted, install
from fastmmu.output import open_closed_streams

CHECK_FAILED, BAD_INPUT = 1, 2
BROKEN_PIPE = 128 + 13  # as of a process that SIGPIPE ends


def answer(arguments: list[str] | None) -> int:
    """Do what the command line asks for."""
    from bench.options import Question, parse

    asked = parse(arguments)
    if isinstance(asked, Question):
        from bench.compare import ask

        return ask(asked)
    from bench.run import run

    return run(asked)


def main(arguments: list[str] | None = None) -> int:
    """Entry point: errors become one line and an exit status."""
    open_closed_streams()
    try:
        install()
        try:
            status = answer(arguments)
            sys.stdout.flush()
            return status
        except BrokenPipeError:  # the reader of a pipe has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return BROKEN_PIPE
        except Exception as error:
            message, status = told(error)
    except Interrupted as error:
        message, status = f"interrupted ({error})", error.status
    print(f"error: {message}", file=sys.stderr)
    return status


def told(error: Exception) -> tuple[str, int]:
    """One line for an error that a user can cause, and its exit status; others are this program's own, and are raised again."""
    from bench.experiment import CheckError
    from bench.options import UsageError
    from bench.results import ResultError
    from bench.rounds import WorkerError
    from fastmmu import ReplayError, TraceError

    if isinstance(error, UsageError | ReplayError | TraceError | ResultError | MemoryError):
        return str(error) or type(error).__name__, BAD_INPUT
    if isinstance(error, CheckError | WorkerError):
        return str(error), CHECK_FAILED
    if isinstance(error, OSError):
        return f"{error.filename or 'output'}: {error.strerror or error}", BAD_INPUT
    raise error


if __name__ == "__main__":
    if "--worker" in sys.argv[1:]:
        from bench.worker import main as worker

        worker()
    else:
        sys.exit(main())
