"""The command line of `fastmmu trace`; what it does is imported when it runs."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

FORMATS = ("lackey", "tracepoints", "elf", "raw", "csv", "npz")
REPLAYS, IMAGES = ("lackey", "tracepoints", "csv", "npz"), ("elf", "raw")
FOR_FORMATS = {  # options that not all formats have
    "merge": ("lackey", "tracepoints", "csv"), "pages": REPLAYS, "max_ptes_none": REPLAYS, "address": ("tracepoints",),
    "cr3": IMAGES, "cr0": IMAGES, "cr4": IMAGES, "efer": IMAGES, "hole": ("raw",),
}  # fmt: skip
SUMMARY = "make a replay file of a trace, or a snapshot of a memory image"
MORE = """Of these:

  lackey       valgrind --tool=lackey --trace-mem=yes                          -> replay
  tracepoints  kvm:kvm_page_fault, kvm:kvm_mmio, kvmmmu:* as text              -> replay
  csv          a header line gva,kind[,size][,gpa][,io][,count], then accesses -> replay
  npz          a replay file, or its columns of records alone                  -> replay
  elf          a core file of QEMU's dump-guest-memory, or of kdump            -> snapshot
  raw          guest physical memory, byte for byte (--cr3 is needed)          -> snapshot

The format is guessed from the content, gzip is undone. Where a trace has no page tables, they are built as an
operating system would, page by page at the first touch. See docs/trace-import.md."""
EXAMPLES = {
    "trace import lackey.txt.gz my-replay.npz": "a valgrind trace",
    "trace import - my-replay.npz": "tracepoints, from a pipe: perf script | fastmmu ...",
    "trace import vm.core my-snapshot.npz": "the page tables of a guest, for translate, explain and map",
}


def touched(text: str) -> int:
    """How many of 512 pages may be untouched."""
    if not re.fullmatch("[0-9]{1,3}", text) or int(text) > 511:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number from 0 to 511")
    return int(text)


def add_trace_command(
    subparsers: argparse._SubParsersAction, number: Callable[[str], int], add_command: Callable[..., argparse.ArgumentParser]
) -> None:
    """Add `trace import`; `number` reads an address, `add_command` is that of command_line.py."""

    def hole(text: str) -> tuple[int, int]:
        start, colon, end = text.partition(":")
        if not colon or number(start) >= number(end) or number(start) % 4096 or number(end) % 4096:
            raise argparse.ArgumentTypeError(f"{text!r}, expected START:END, multiples of 1000 in hexadecimal: 80000000:100000000")
        return number(start), number(end)

    group = subparsers.add_parser("trace", help="make files for fastmmu of traces and memory images of other tools")
    commands = group.add_subparsers(dest="trace_command", metavar="COMMAND", required=True)
    run = "fastmmu.importers.command:import_command"
    command = add_command(commands, "import", run, SUMMARY, MORE, EXAMPLES, {0: "imported"})
    command.add_argument("file", metavar="INPUT", help="the trace or image; - is the standard input")
    command.add_argument("output", type=Path, metavar="OUTPUT.npz", help="the file to write; replaced only when all went well")
    command.add_argument("--format", choices=FORMATS, help="format of the input (default: guessed)")
    command.add_argument(
        "--merge",
        choices=("consecutive", "tlb", "none"),
        help="accesses that become one record with a count: consecutive ones to a page (default), those that a TLB of 16 sets by 4 "
        "ways would absorb, or none",
    )
    command.add_argument(
        "--pages", choices=("4k", "2m"), help="pages of the tables built (default: 4k); 2m: where 2 MiB are touched whole"
    )
    command.add_argument(
        "--max-ptes-none", type=touched, metavar="N", help="with --pages 2m: how many of 512 pages may be untouched (default: 0)"
    )
    command.add_argument(
        "--address",
        choices=("auto", "gpa", "gva"),
        help="what kvm_page_fault's address is (default: by `# npt0` and `# npt1` lines, else by error code)",
    )
    for name in ("cr3", "cr0", "cr4", "efer"):
        command.add_argument(f"--{name}", type=number, help=f"{name.upper()} of an image, instead of what it says, in hexadecimal")
    command.add_argument("--hole", type=hole, metavar="START:END", help="of a raw image: addresses that the file skips")
    command.add_argument("--json", action="store_true", help="print the summary as JSON")
