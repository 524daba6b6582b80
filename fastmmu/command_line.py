"""The command line of `fastmmu`: what each subcommand takes, and its help, which says all that a user needs.

Nothing heavy is imported here: `run` is the place of the function that does the work, `fastmmu.commands:replay_command`.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, NoReturn

from fastmmu.bits import PHYSICAL_BITS
from fastmmu.importers.options import add_trace_command
from fastmmu.interrupts import INTERRUPTED
from fastmmu.output import BAD_INPUT
from fastmmu.qualification import ACTS, POLICIES, STRATEGIES
from fastmmu.races import RACES
from fastmmu.trace.npz import MAXPHYADDR
from fastmmu.translate import checked_gva

FEWEST_BITS = 36  # of a physical address, as `Cpu` has it
HOST_PAGES = ("4k", "2m", "1g")
USUAL_EXITS = {BAD_INPUT: "bad input: one line says what, where, and what was expected", INTERRUPTED: "interrupted (Ctrl-C)"}

Commands = Any
"""What `add_subparsers` gives; argparse has no public name for it."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(BAD_INPUT, f"error: {message}\n")


def number(text: str) -> int:
    """An address on the command line: 0x…, or hexadecimal without it. Python's int would take signs, blanks and `_` too."""
    try:
        if not re.fullmatch("(0x)?[0-9a-fA-F]+", text):
            raise ValueError
        return checked_gva(int(text, 16))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no address, expected hexadecimal of up to 64 bits") from None


def address_bits(text: str) -> int:
    """MAXPHYADDR."""
    if not re.fullmatch("[0-9]{1,2}", text) or not FEWEST_BITS <= int(text) <= PHYSICAL_BITS:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number of bits from {FEWEST_BITS} to {PHYSICAL_BITS}")
    return int(text)


def geometry(text: str) -> tuple[int, int]:
    """A TLB on the command line: SETSxWAYS."""
    try:
        if not re.fullmatch("[0-9]{1,7}[xX][0-9]{1,2}", text):
            raise ValueError
        sets, ways = (int(part) for part in text.lower().split("x"))
        if not 1 <= sets <= 1 << 20 or sets & (sets - 1) or not 1 <= ways <= 64:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no TLB, expected SETSxWAYS, the sets a power of two: 256x4") from None
    return sets, ways


def positive(text: str) -> int:
    """A number of records."""
    if not re.fullmatch("[0-9]{1,18}", text) or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}, expected a positive number")
    return int(text)


def add_command(
    commands: Commands, name: str, run: str, summary: str, more: str, examples: dict[str, str], exits: dict[int, str]
) -> argparse.ArgumentParser:
    """A subcommand with its help.

    Args:
        commands: from `add_subparsers`.
        name: of the subcommand.
        run: `module:function`, which takes the parsed arguments and returns the exit status.
        summary: one sentence, without a full stop.
        more: what else there is to know; may be empty.
        examples: command lines without `fastmmu`, each with what it does.
        exits: exit statuses with their meaning; those of USUAL_EXITS are added.
    """
    width = max(map(len, examples))
    lines = ["examples:", *(f"  fastmmu {line:{width}}  # {does}" for line, does in examples.items())]
    lines += ["", "exit status:", *(f"  {status:<3}  {means}" for status, means in sorted((exits | USUAL_EXITS).items()))]
    command = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}." + (f" {more}" if more else ""),
        epilog="\n".join(lines),
        formatter_class=HelpFormatter,
    )
    command.set_defaults(run=run)
    return command


class HelpFormatter(argparse.HelpFormatter):
    """Descriptions are filled, epilogs stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return "".join(indent + line for line in text.splitlines(keepends=True))
        return super()._fill_text(text, width, indent)


def add_snapshot(command: argparse.ArgumentParser) -> None:
    """What a command on a snapshot takes."""
    command.add_argument("snapshot", type=Path, metavar="SNAPSHOT", help="an .npz snapshot (docs/snapshot-format.md)")
    command.add_argument(
        "--cr3", type=number, metavar="GPA", help="page-table root, hexadecimal (default: the snapshot's active one)"
    )
    command.add_argument(
        "--maxphyaddr",
        type=address_bits,
        default=MAXPHYADDR,
        metavar="N",
        help=f"physical-address bits, {FEWEST_BITS} to {PHYSICAL_BITS} (default: {MAXPHYADDR})",
    )


def add_access(command: argparse.ArgumentParser) -> None:
    """Addresses, and how they are accessed."""
    command.add_argument("gvas", type=number, nargs="+", metavar="GVA", help="guest virtual addresses, hexadecimal, 0x or not")
    command.add_argument("--user", action="store_true", help="a user access (default: supervisor)")
    command.add_argument("--write", action="store_true", help="a write (default: a read)")
    command.add_argument("--fetch", action="store_true", help="an instruction fetch")


WALK_EXITS = {0: "every address translates", 1: "one faults"}


def add_translate(commands: Commands) -> None:
    """`fastmmu translate`."""
    command = add_command(
        commands,
        "translate",
        "fastmmu.snapshot_commands:translate_command",
        "translate guest virtual addresses by the page tables of a snapshot",
        "One line for each address: the gpa, page size and rights, or the fault with its error code and the deciding bit.",
        {
            "translate boot.npz ffffffff81000000": "a supervisor read",
            "translate boot.npz 400000 401000 --user --write": "user writes",
        },
        WALK_EXITS,
    )
    add_snapshot(command)
    add_access(command)
    command.add_argument("--explain", action="store_true", help="print what `fastmmu explain` prints")


def add_explain(commands: Commands) -> None:
    """`fastmmu explain`."""
    command = add_command(
        commands,
        "explain",
        "fastmmu.snapshot_commands:explain_command",
        "show the page walk of guest virtual addresses, entry by entry, as a tree",
        "Each entry has its index in its table, its address and value, its bits by name, and what it and those above grant: "
        'u user, r read, w write, x fetch, a dash for what is missing. "<-" marks the entry and the bit that decide on a fault, '
        '"=>" the answer.',
        {
            "explain boot.npz ffffffff81000000": "how the kernel's text is mapped",
            "explain boot.npz ffffffff81000000 --user": "why user code may not read it",
            "explain boot.npz ffffffff81000000 --json": "the same for programs",
        },
        WALK_EXITS,
    )
    add_snapshot(command)
    add_access(command)
    command.add_argument("--json", action="store_true", help="print a JSON list, one object for each address")


def add_map(commands: Commands) -> None:
    """`fastmmu map`."""
    command = add_command(
        commands,
        "map",
        "fastmmu.snapshot_commands:map_command",
        "list what an address space maps: regions with their rights and page sizes",
        "A region is a range of addresses whose pages all have the same rights, those of all entries together: u user, r read, "
        "w write, x fetch, g global, a dash for what is missing. Its end is the first address behind it. Entries that set a "
        "reserved bit, or whose table lies outside memory, map nothing.",
        {
            "map boot.npz": "what the active page tables map",
            "map boot.npz --cr3 2a0a000 --user": "what user code of another process may read",
            "map boot.npz --gpa --csv": "where it lies in guest physical memory, for a spreadsheet",
        },
        {0: "the regions were listed"},
    )
    add_snapshot(command)
    command.add_argument("--user", action="store_true", help="only what user code may access")
    command.add_argument(
        "--gpa", action="store_true", help="show the gpa; a region also ends where the page size changes or the gpa does not go on"
    )
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON; addresses are hexadecimal strings")
    form.add_argument("--csv", action="store_true", help="print CSV with a line of column names")


def add_validate(commands: Commands) -> None:
    """`fastmmu validate`."""
    command = add_command(
        commands,
        "validate",
        "fastmmu.commands:validate_command",
        "replay scenario files and compare with what a real KVM counted",
        "",
        {
            "validate examples/*.json": "every counter after every step",
            "validate --audit --json one.json": "and the whole state after each step; JSON",
        },
        {
            0: "everything is as KVM counted it",
            1: "a value differs",
            3: "a scenario needs what is not built yet, and nothing else is wrong",
        },
    )
    command.add_argument("files", type=Path, nargs="+", metavar="FILE", help="a kvm-truth/1 scenario (docs/scenario-format.md)")
    command.add_argument("--audit", action="store_true", help="check the whole state after each step")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")


def add_replay(commands: Commands) -> None:
    """`fastmmu replay`."""
    command = add_command(
        commands,
        "replay",
        "fastmmu.commands:replay_command",
        "replay a recorded stream through KVM's MMU and print what it counted",
        "Every record must translate to the address that the recording machine went to.",
        {
            "replay my.npz": "the TDP MMU",
            "replay my.npz --mmu shadow --audit": "shadow paging, its state checked on the way",
            "replay my.npz --host-page 2m --ept --json": "EPT over huge pages of the host; JSON",
        },
        {0: "every record went where it was recorded to go", 1: "one went elsewhere, or the machine cannot go on"},
    )
    command.add_argument("file", type=Path, metavar="FILE", help="an .npz replay file (docs/replay-format.md)")
    command.add_argument(
        "--mmu",
        choices=("tdp", "legacy", "shadow"),
        default="tdp",
        help="TDP MMU, the shadow MMU's direct map, or shadow paging (default: tdp)",
    )
    command.add_argument("--host-page", choices=HOST_PAGES, default="4k", help="the host's own mapping of the memory (default: 4k)")
    command.add_argument("--tlb", type=geometry, default=(256, 4), metavar="SETSxWAYS", help="the vCPU's TLB (default: 256x4)")
    command.add_argument("--ept", action="store_true", help="sptes and faults of EPT (default: NPT)")
    command.add_argument("--nx-huge-pages", action="store_true", help="huge pages are never executable")
    command.add_argument("--records", type=positive, metavar="N", help="the first N records only")
    command.add_argument("--audit", action="store_true", help="check the whole state every 65,536 events")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")


def add_qualification(commands: Commands) -> None:
    """`fastmmu qualification`."""
    command = add_command(
        commands,
        "qualification",
        "fastmmu.commands:qualification_command",
        "watch what a nested hypervisor is told of a device page, step by step",
        "L2 accesses a device page that L1 has mapped for it and L0 emulates. Each step is told, up to the first access that never "
        "completes, because the whole state recurs.",
        {
            "qualification read write": "the loop of 2018: a write that never completes",
            "qualification read write --strategy derived": "its end",
        },
        {0: "all accesses complete", 1: "one never does"},
    )
    command.add_argument("acts", nargs="+", metavar="ACT", help=f"what happens, in this order: {', '.join(ACTS)}")
    command.add_argument(
        "--strategy", choices=STRATEGIES, default=STRATEGIES[0], help="where L0 takes the access bits from (default: stale)"
    )
    command.add_argument("--l1", choices=POLICIES, default=POLICIES[0], help="what L1 grants (default: exact, what it is told)")
    command.add_argument("--no-execute-only", action="store_true", help="L1's EPT has no entries with X alone")
    command.add_argument("--json", action="store_true", help="print JSON instead of text")


def add_races(commands: Commands) -> None:
    """`fastmmu races`."""
    command = add_command(
        commands,
        "races",
        "fastmmu.commands:races_command",
        "try every order of steps on the path without the mmu lock, with each guard in place and with it taken out",
        "The functions that ship run as threads that take turns at each shared word, in every order that matters. The shortest "
        "wrong order is printed as columns.",
        {"races": "all programs, some seconds each", "races zap split": "two of them"},
        {0: "no order is wrong with the guard in place, and one is without it", 1: "otherwise"},
    )
    command.add_argument("names", nargs="*", metavar="NAME", help=f"programs (default: all): {', '.join(RACES)}")


def add_trace(commands: Commands) -> None:
    """`fastmmu trace import`."""
    add_trace_command(commands, number, add_command)


COMMANDS = (add_translate, add_explain, add_map, add_validate, add_replay, add_trace, add_qualification, add_races)


def make_parser() -> Parser:
    """The whole command line."""
    parser = Parser(
        prog="fastmmu",
        description="An executable model of KVM's x86 MMU.",
        epilog="`fastmmu COMMAND --help` has examples and the exit status of each. An error is one line on the standard error.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    return parser
