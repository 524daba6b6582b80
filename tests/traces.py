"""What the tests of `fastmmu trace import` share: the command, small inputs, a walk of imported tables in plain Python."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastmmu.__main__ import main

Columns = dict[str, np.ndarray]
ADDRESS = 0x000F_FFFF_FFFF_F000
FAULT = "kvm_page_fault: vcpu 0 rip 0x4000 address 0x{:016x} error_code 0x{:x}"
MMIO = "kvm_mmio: mmio {} len {} gpa 0x{:x} val 0x0"


def imported(tmp_path: Path, content: str | bytes, *options: str, name: str = "in.txt") -> Columns:
    """The columns that come of a file with this content."""
    path, output = tmp_path / name, tmp_path / "out.npz"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert main(["trace", "import", str(path), str(output), *options]) == 0
    with np.load(output) as columns:
        return {column: columns[column] for column in columns.files}


def meta(columns: Columns) -> dict[str, Any]:
    return json.loads(str(columns["meta"]))


def accesses(columns: Columns) -> list[tuple[int, ...]]:
    """(gva, kind, count) of each record."""
    return list(zip(columns["gva"].tolist(), columns["kind"].tolist(), columns["count"].tolist(), strict=True))


def walks(columns: Columns) -> Iterator[tuple[int | None, int | None, int, int]]:
    """For each record its gpa by the tables just before its own stores, and after; level and rights (as `prot`) after.

    A walk as the manual has it, over words that the file's stores leave, one record after another.
    """
    words: dict[int, int] = {}
    levels, root = meta(columns)["paging_levels"], meta(columns)["cr3_start"]
    assert columns["start_gfn"].tolist() == [root >> 12]
    assert not columns["start_words"].any()

    def walk(gva: int) -> tuple[int | None, int, int]:
        table, user, write, nx = root, 1, 2, 0
        for level in range(levels, 0, -1):
            shift = 3 + 9 * level
            entry = words.get(table + (gva >> shift & 511) * 8, 0)
            if not entry & 1:
                return None, level, 0
            user, write, nx = user & (entry >> 2 & 1), write & (entry & 2), nx | entry >> 63 << 2
            if level == 1 or entry & 0x80:
                low = (1 << shift) - 1
                return entry & ADDRESS & ~low | gva & low, level, user | write | nx
            table = entry & ADDRESS
        raise AssertionError("no leaf at level 1")

    stores = list(zip(*(columns[name].tolist() for name in ("pt_record", "pt_gpa", "pt_value")), strict=True))
    at = 0
    for record, gva in enumerate(columns["gva"].tolist()):
        before = walk(gva)[0]
        while at < len(stores) and stores[at][0] <= record:
            words[stores[at][1]] = stores[at][2]
            at += 1
        gpa, level, rights = walk(gva)
        yield before, gpa, level, rights
    assert at == len(stores)


def check_tables(columns: Columns) -> None:
    """Every record goes where it says, with the rights it says; a page is mapped by the record that touches it first."""
    seen: set[int] = set()
    flushed = set(columns["event_record"].tolist())
    for record, (before, gpa, level, rights) in enumerate(walks(columns)):
        page = int(columns["gva"][record]) >> 12
        assert gpa == int(columns["gpa"][record])
        assert level == int(columns["level"][record])
        assert rights == int(columns["prot"][record])
        if level == 1:
            assert (before is None) == (page not in seen)
        assert before in (None, gpa) or record in flushed
        seen.add(page)


def core_file(
    pages: dict[int, bytes], cpus: list[tuple[int, int, int]], *, bits: int = 64, machine: int = 62, notes: bytes = b""
) -> bytes:
    """An ELF core file: `pages` by frame, (CR0, CR3, CR4) of each CPU in a note of QEMU."""
    note = notes
    for cr0, cr3, cr4 in cpus:
        segments = struct.pack("<IIIIQ", 8, 0xFFFFFFFF, 0xA09B00, 0, 0) * 10
        state = struct.pack("<II18Q", 1, 440, *range(18)) + segments + struct.pack("<5QQ", cr0, 0, 0, cr3, cr4, 0)
        note += struct.pack("<III4sxxxx", 5, len(state), 0, b"QEMU") + state
    loads = [(frame << 12, page) for frame, page in sorted(pages.items())]
    count, wide = len(loads) + 1, bits == 64
    header, entry = (64, 56) if wide else (52, 32)
    offset = header + entry * count
    programs, content = b"", b""
    for number, (gpa, data) in enumerate([(0, note), *loads]):
        kind, size = 1 if number else 4, len(data)
        if wide:
            programs += struct.pack("<IIQQQQQQ", kind, 0, offset, 0, gpa, size, size, 0)
        else:
            programs += struct.pack("<IIIIIIII", kind, offset, 0, gpa, size, size, 0, 0)
        content += data
        offset += size
    ident = struct.pack("<4sBBB9x", b"\x7fELF", 2 if wide else 1, 1, 1)
    words = "<HHIQQQIHHHHHH" if wide else "<HHIIIIIHHHHHH"
    return ident + struct.pack(words, 4, machine, 1, 0, header, 0, 0, header, entry, count, 0, 0, 0) + programs + content
