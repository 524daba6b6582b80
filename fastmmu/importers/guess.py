"""The format of an input, from its first bytes."""

from __future__ import annotations

import re

from fastmmu.importers.csv_text import COLUMNS, NEEDED
from fastmmu.importers.elf import MAGIC, OTHER_DUMPS
from fastmmu.importers.tracepoints import BARE, EXPECTED, LONGEST_LINE, PREFIX, SECTION

LACKEY = re.compile(rb"==\d+== | *[ILSM] +[0-9a-fA-F]+(?:,|\s*$)")
LINES = 1_000
TRACER = re.compile(rb"# (?:tracer: |\s*TASK|entries-in-buffer)|cpus=\d+$")
KVM = re.compile(r"(?:kvm|vcpu|fast_page_fault|mark_mmio|check_mmio|handle_mmio)")


def guess_format(head: bytes) -> str:
    """One of the formats, or an empty text where there is no telling: a raw image has no mark."""
    if head[:4] == MAGIC or any(head.startswith(magic) for magic in OTHER_DUMPS):
        return "elf"
    if head[:4] == b"PK\x03\x04":
        return "npz"
    if b"\0" in head:
        return ""
    for line in head.split(b"\n")[:LINES]:
        found = guess_line(line[:LONGEST_LINE])
        if found:
            return found
    return ""


def guess_line(line: bytes) -> str:
    """The format that a line belongs to, if it is typical of one."""
    if LACKEY.match(line):
        return "lackey"
    names = {name.strip().lower() for name in line.decode("utf-8-sig", "replace").split(",")}
    if names >= set(NEEDED) and names <= set(COLUMNS):
        return "csv"
    if SECTION.match(line) or TRACER.match(line):
        return "tracepoints"
    found = PREFIX.match(line)
    event = found["event"] if found else bare[1] if (bare := BARE.match(line)) else b""
    return "tracepoints" if event.decode() in EXPECTED or KVM.match(event.decode()) else ""
