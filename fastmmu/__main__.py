"""The `fastmmu` command. It imports nothing before Ctrl-C is taken care of."""

from __future__ import annotations

import os
import sys

from fastmmu.interrupts import INTERRUPTED, interruptible
from fastmmu.output import BAD_INPUT, complain, open_closed_streams


def run(arguments: list[str] | None) -> int:
    """Do what the command line says; errors become one line and exit status 2."""
    from pkgutil import resolve_name

    from fastmmu.address_space import TooManyRegions
    from fastmmu.command_line import make_parser
    from fastmmu.processor import GeneralProtection
    from fastmmu.trace import TraceError

    args = make_parser().parse_args(arguments)
    try:
        return resolve_name(args.run)(args)
    except TraceError as error:
        complain(error)
    except (GeneralProtection, TooManyRegions, MemoryError) as error:
        complain(f"{getattr(args, 'snapshot', None) or getattr(args, 'file', args.command)}: {error}")
    return BAD_INPUT


def drop_output() -> None:
    """Nothing more can be written: let the rest go where nobody looks, so that the interpreter's end is quiet too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(arguments: list[str] | None = None) -> int:
    """Entry point: the exit status, and no traceback."""
    open_closed_streams()
    try:
        with interruptible(whole_process=arguments is None):
            try:
                return run(arguments)
            finally:
                sys.stdout.flush()
    except BrokenPipeError:
        drop_output()  # the reader has gone; nothing is left to say
        return 0
    except OSError as error:
        drop_output()
        complain(f"{error.filename or 'output'}: {error.strerror or error}")
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
