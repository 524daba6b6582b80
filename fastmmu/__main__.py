"""The `fastmmu` command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from fastmmu import commands
from fastmmu.importers.options import add_trace_command
from fastmmu.processor import GeneralProtection
from fastmmu.qualification import ACTS, POLICIES, STRATEGIES
from fastmmu.races import RACES
from fastmmu.trace import TraceError
from fastmmu.trace.npz import MAXPHYADDR
from fastmmu.translate import checked_gva

BAD_INPUT = commands.UNREADABLE


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


def geometry(text: str) -> tuple[int, int]:
    """A TLB on the command line: SETSxWAYS."""
    try:
        sets, ways = (int(part) for part in text.lower().split("x"))
        if not 1 <= sets <= 1 << 20 or sets & (sets - 1) or not 1 <= ways <= 64:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no TLB, expected SETSxWAYS, the sets a power of two: 256x4") from None
    return sets, ways


def positive(text: str) -> int:
    """A number of records."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}, expected a positive number")
    return int(text)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="fastmmu", description="An executable model of KVM's x86 MMU.")
    subparsers = parser.add_subparsers(dest="command", required=True)
    command = subparsers.add_parser("translate", help="translate guest virtual addresses by the page tables of a snapshot")
    command.set_defaults(run=commands.translate_command)
    command.add_argument("snapshot", type=Path, metavar="SNAPSHOT", help="an .npz snapshot (docs/snapshot-format.md)")
    command.add_argument("gvas", type=number, nargs="+", metavar="GVA", help="guest virtual addresses, hexadecimal")
    command.add_argument("--cr3", type=number, help="page-table root (default: the snapshot's active one)")
    command.add_argument("--user", action="store_true", help="a user access (default: supervisor)")
    command.add_argument("--write", action="store_true", help="a write (default: a read)")
    command.add_argument("--fetch", action="store_true", help="an instruction fetch")
    command.add_argument("--maxphyaddr", type=int, default=MAXPHYADDR, help=f"physical-address bits (default: {MAXPHYADDR})")
    command.add_argument("--explain", action="store_true", help="show each entry of the walk")

    command = subparsers.add_parser("validate", help="replay scenario files and compare with what a real KVM counted")
    command.set_defaults(run=commands.validate_command)
    command.add_argument("files", type=Path, nargs="+", metavar="FILE", help="a kvm-truth/1 scenario (docs/scenario-format.md)")
    command.add_argument("--audit", action="store_true", help="check the whole state after each step")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")

    command = subparsers.add_parser("replay", help="replay a recorded stream through KVM's MMU")
    command.set_defaults(run=commands.replay_command)
    command.add_argument("file", type=Path, metavar="FILE", help="an .npz replay file (docs/replay-format.md)")
    command.add_argument(
        "--mmu", choices=("tdp", "legacy", "shadow"), default="tdp", help="TDP MMU, or the shadow MMU's direct map"
    )
    levels = tuple(commands.HOST_LEVELS)
    command.add_argument("--host-page", choices=levels, default="4k", help="the host's own mapping of the memory (default: 4k)")
    command.add_argument("--tlb", type=geometry, default=(256, 4), metavar="SETSxWAYS", help="the vCPU's TLB (default: 256x4)")
    command.add_argument("--ept", action="store_true", help="sptes and faults of EPT (default: NPT)")
    command.add_argument("--nx-huge-pages", action="store_true", help="huge pages are never executable")
    command.add_argument("--records", type=positive, help="the first records only")
    command.add_argument("--audit", action="store_true", help="check the whole state every 65,536 events")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")

    command = subparsers.add_parser(
        "qualification",
        help="watch what a nested hypervisor is told of a device page, step by step",
        description="L2 accesses a device page that L1 has mapped for it and L0 emulates. Each step is told, up to the first "
        "access that never completes, because the whole state recurs. Exit status 0 if all accesses complete, 1 if one does not.",
    )
    command.set_defaults(run=commands.qualification_command)
    command.add_argument("acts", nargs="+", metavar="ACT", help=f"what happens, in this order: {', '.join(ACTS)}")
    command.add_argument(
        "--strategy", choices=STRATEGIES, default=STRATEGIES[0], help="where L0 takes the access bits from (default: stale)"
    )
    command.add_argument("--l1", choices=POLICIES, default=POLICIES[0], help="what L1 grants (default: exact, what it is told)")
    command.add_argument("--no-execute-only", action="store_true", help="L1's EPT has no entries with X alone")
    command.add_argument("--json", action="store_true", help="print JSON instead of text")

    command = subparsers.add_parser(
        "races",
        help="try every order of steps on the path without the mmu lock, with each guard in place and with it taken out",
        description="Run the functions that ship as threads that take turns at each shared word, in every order that matters. "
        "Exit status 0 if no order is wrong with the guard in place, and one is without it.",
    )
    command.set_defaults(run=commands.races_command)
    command.add_argument("names", nargs="*", metavar="NAME", help=f"programs (default: all): {', '.join(RACES)}")
    add_trace_command(subparsers, number)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Entry point: errors become one line and exit status 2."""
    args = parse(arguments)
    try:
        return args.run(args)
    except TraceError as error:
        commands.complain(error)
    except (GeneralProtection, MemoryError) as error:
        commands.complain(f"{getattr(args, 'snapshot', None) or args.file}: {error}")
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; nothing is left to say
        return 0
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
