"""The `fastmmu` command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from fastmmu.explain import explain
from fastmmu.processor import GeneralProtection
from fastmmu.trace import TraceError, load_snapshot
from fastmmu.trace.npz import MAXPHYADDR
from fastmmu.translate import FETCH, USER, WRITE, checked_gva, translate_many

FAULTED, BAD_INPUT = 1, 2


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(BAD_INPUT, f"error: {message}\n")


def number(text: str) -> int:
    """An address on the command line: 0x…, or hexadecimal without it."""
    try:
        value = int(text, 0) if text.lower().startswith("0x") else int(text, 16)
        return checked_gva(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no address, expected hexadecimal of up to 64 bits") from None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="fastmmu", description="Walk the page tables of a guest.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("translate", help="translate guest virtual addresses by the page tables of a snapshot")
    command.add_argument("snapshot", type=Path, metavar="SNAPSHOT", help="an .npz snapshot (docs/snapshot-format.md)")
    command.add_argument("gvas", type=number, nargs="+", metavar="GVA", help="guest virtual addresses, hexadecimal")
    command.add_argument("--cr3", type=number, help="page-table root (default: the snapshot's active one)")
    command.add_argument("--user", action="store_true", help="a user access (default: supervisor)")
    command.add_argument("--write", action="store_true", help="a write (default: a read)")
    command.add_argument("--fetch", action="store_true", help="an instruction fetch")
    command.add_argument("--maxphyaddr", type=int, default=MAXPHYADDR, help=f"physical-address bits (default: {MAXPHYADDR})")
    command.add_argument("--explain", action="store_true", help="show each entry of the walk")
    return parser.parse_args(arguments)


def translate_command(args: argparse.Namespace) -> int:
    """`fastmmu translate`: one line for each address; exit status 1 when one faults."""
    snapshot = load_snapshot(args.snapshot, cr3=args.cr3, maxphyaddr=args.maxphyaddr)
    access = WRITE * args.write | USER * args.user | FETCH * args.fetch
    told = [explain(snapshot.memory, snapshot.cpu, gva, access) for gva in args.gvas]
    answers = translate_many(snapshot.memory, snapshot.cpu, args.gvas, access)
    for gva, text in zip(args.gvas, told, strict=True):
        print(text if args.explain else f"{gva:#x}: {text.rsplit('=> ', 1)[1]}")
    return 0 if answers.ok.all() else FAULTED


def main(arguments: list[str] | None = None) -> int:
    """Entry point: errors become one line and exit status 2."""
    args = parse(arguments)
    try:
        return translate_command(args)
    except TraceError as error:
        message = str(error)
    except (GeneralProtection, MemoryError) as error:
        message = f"{args.snapshot}: {error}"
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; nothing is left to say
        return 0
    print(f"error: {message}", file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
