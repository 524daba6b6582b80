"""ELF core files of a whole machine: memory by physical address, and the registers that QEMU notes.

The layouts are those of the ELF specification (figures 1-3, 2-1, 2-3), of QEMU's documented note (name `QEMU`, one for each CPU,
version 1), and of the kernel's vmcoreinfo (documentation: admin-guide/kdump/vmcoreinfo).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NoReturn

from fastmmu.bits import PHYSICAL_LIMIT
from fastmmu.importers.image import Segment
from fastmmu.importers.source import Source

MAGIC = b"\x7fELF"
OTHER_DUMPS = {
    b"KDUMP   ": "a kdump-compressed file, expected ELF: dump without -z, -l, -s and -w, or convert it with makedumpfile -E",
    b"makedumpfile": "a flattened kdump file, expected ELF: convert it with makedumpfile -R and -E",
}
CORE, EM_386, EM_X86_64 = 4, 3, 62
PT_LOAD, PT_NOTE = 1, 4
PN_XNUM = 0xFFFF  # the number of program headers stands in the first section header
# header: type, machine, phoff, shoff, phnum; program header: type, offset, paddr, filesz; section header: info
HEADER = {1: struct.Struct("<16xHH4x4xII4xHHHHHH"), 2: struct.Struct("<16xHH4x8xQQ4xHHHHHH")}
PROGRAM = {1: struct.Struct("<IIIIIIII"), 2: struct.Struct("<IIQQQQQQ")}
SECTION_INFO = {1: 28, 2: 44}
MOST_HEADERS = 1 << 20
NOTE = struct.Struct("<III")
# QEMU's CPU state: version, size; 18 registers; ten segments of 24 bytes; CR0 to CR4
CPU_STATE = struct.Struct("<II 144x 240x 5Q")
CPU_VERSION = 1
KERNEL_MAP = 0xFFFF_FFFF_8000_0000
ROOTS = (b"SYMBOL(swapper_pg_dir)", b"SYMBOL(init_top_pgt)")
VMCORE = re.compile(rb"^(SYMBOL\(\w+\)|NUMBER\(\w+\))=(-?[0-9a-f]{1,16})$", re.MULTILINE)


@dataclass
class Core:
    """What such a file tells: segments, CR0, CR3, CR4 of each CPU, the kernel's root from vmcoreinfo."""

    long_mode: bool
    segments: list[Segment] = field(default_factory=list)
    cpus: list[tuple[int, int, int]] = field(default_factory=list)
    kernel_root: int | None = None
    la57: bool = False


class ElfReader:
    """A reader of one core file, mapped."""

    def __init__(self, source: Source, data: memoryview) -> None:
        self._source, self._data = source, data

    def fail(self, where: str, message: str) -> NoReturn:
        """FILE: where, what, what was expected."""
        self._source.fail(f"{where}: {message}")

    def read(self) -> Core:
        """Read headers and notes.

        Raises:
            TraceError: FILE: what, where, what was expected.
        """
        for magic, message in OTHER_DUMPS.items():
            if bytes(self._data[: len(magic)]) == magic:
                self._source.fail(message)
        if bytes(self._data[:4]) != MAGIC:
            self.fail("ELF header", f"begins with {bytes(self._data[:4])!r}, expected {MAGIC!r}")
        kind = self._at(4, 1, "ELF header")[0]
        if kind not in HEADER or self._at(5, 1, "ELF header")[0] != 1:
            self.fail("ELF header", f"class {kind}, data encoding {self._data[5]}, expected class 1 or 2 and little endian (1)")
        fields = HEADER[kind].unpack(self._at(0, HEADER[kind].size, "ELF header"))
        elf_type, machine, headers, sections, _, entry_size, count = fields[:7]
        if elf_type != CORE or machine not in (EM_386, EM_X86_64):
            self.fail("ELF header", f"type {elf_type}, machine {machine}, expected a core file (4) of an x86 machine (3 or 62)")
        if entry_size != PROGRAM[kind].size:
            self.fail("ELF header", f"program headers of {entry_size} bytes, expected {PROGRAM[kind].size}")
        if count == PN_XNUM:
            (count,) = struct.unpack("<I", self._at(sections + SECTION_INFO[kind], 4, "section header 0"))
        if not 0 < count <= MOST_HEADERS:
            self.fail("ELF header", f"{count} program headers, expected 1 to {MOST_HEADERS:,}")
        core = Core(machine == EM_X86_64)
        for number in range(count):
            self._program(core, kind, number, headers + number * entry_size)
        if not core.segments:
            self.fail("program headers", "no memory (PT_LOAD), expected some")
        return core

    def _at(self, offset: int, size: int, where: str) -> memoryview:
        if offset + size > len(self._data):
            end, length = offset + size, len(self._data)
            self.fail(where, f"bytes {offset:#x} to {end:#x} of a file of {length:#x} bytes, expected a whole file")
        return self._data[offset : offset + size]

    def _program(self, core: Core, kind: int, number: int, at: int) -> None:
        where = f"program header {number}"
        fields = PROGRAM[kind].unpack(self._at(at, PROGRAM[kind].size, where))
        if kind == 1:
            segment_type, offset, _, gpa, size = fields[:5]
        else:
            segment_type, _, offset, _, gpa, size = fields[:6]
        if segment_type not in (PT_LOAD, PT_NOTE) or not size:
            return
        content = self._at(offset, size, where)
        if segment_type == PT_NOTE:
            self._notes(core, content, where)
        elif gpa + size <= PHYSICAL_LIMIT:
            core.segments.append(Segment(gpa, size, offset))
        elif gpa not in ((1 << 32) - 1, (1 << 64) - 1):  # kdump's mark of memory without a physical address
            self.fail(where, f"physical address {gpa:#x}, {size:#x} bytes, expected memory below {PHYSICAL_LIMIT:#x}")

    def _notes(self, core: Core, content: memoryview, where: str) -> None:
        for number, (name, description) in enumerate(self._split_notes(content, where)):
            if name == b"QEMU":
                if len(description) < CPU_STATE.size:
                    message = f"{len(description)} bytes, expected a CPU state of at least {CPU_STATE.size}"
                    self.fail(f"{where}, note {number}", message)
                version, _, cr0, _, _, cr3, cr4 = CPU_STATE.unpack(description[: CPU_STATE.size])
                if version != CPU_VERSION:
                    self.fail(f"{where}, note {number}", f"a CPU state of version {version}, expected {CPU_VERSION}")
                core.cpus.append((cr0, cr3, cr4))
            elif name == b"VMCOREINFO":
                self._vmcoreinfo(core, bytes(description))

    @staticmethod
    def _vmcoreinfo(core: Core, text: bytes) -> None:
        """The root of the kernel's own page tables, from the address of `swapper_pg_dir` in the kernel's mapping of itself."""
        found = VMCORE.findall(text)
        known = {key: int(value, 16 if key in ROOTS else 10) for key, value in found if key in ROOTS or value.strip(b"-").isdigit()}
        core.la57 = bool(known.get(b"NUMBER(pgtable_l5_enabled)", 0))
        root = known.get(ROOTS[0]) or known.get(ROOTS[1]) or 0
        if root >= KERNEL_MAP and b"NUMBER(phys_base)" in known:
            core.kernel_root = root - KERNEL_MAP + known[b"NUMBER(phys_base)"]

    def _split_notes(self, content: memoryview, where: str) -> Iterator[tuple[bytes, memoryview]]:
        at, number = 0, 0
        while at + NOTE.size <= len(content):
            name_size, size, _ = NOTE.unpack(content[at : at + NOTE.size])
            begin = at + NOTE.size + (name_size + 3) // 4 * 4
            end = begin + size
            if end > len(content):
                self.fail(f"{where}, note {number}", f"ends at {end:#x}, expected at most {len(content):#x}")
            yield bytes(content[at + NOTE.size : at + NOTE.size + name_size]).rstrip(b"\0"), content[begin:end]
            at, number = (end + 3) // 4 * 4, number + 1
