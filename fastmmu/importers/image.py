"""Memory images: guest physical pages out of a mapped file, and the page tables reachable in them, as a snapshot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO

import numpy as np

from fastmmu.bits import CR4, EFER, GPTE32, GPTE64, PAGE_SIZE, PHYSICAL_LIMIT
from fastmmu.importers.spool import NpzWriter
from fastmmu.paging import Cpu, Mode
from fastmmu.trace.npz import TraceError

LEVELS = {Mode.TWO_LEVEL: 2, Mode.PAE: 3, Mode.LONG4: 4, Mode.LONG5: 5}
SNAPSHOT_LIMIT = 1 << 46  # the memory of a snapshot is reserved as one piece of the address space
PDPTES = 4  # of PAE paging, where CR3 points at 32 bytes


@dataclass(frozen=True)
class Segment:
    """A part of guest physical memory: `size` bytes from `gpa` on stand in the file from `offset` on."""

    gpa: int
    size: int
    offset: int


class Image:
    """Guest physical memory in a file. Only what is asked for is read."""

    def __init__(self, data: memoryview | bytes, segments: Iterable[Segment]) -> None:
        self._data = data
        self._segments: list[Segment] = []
        covered = 0
        for one in sorted(segments, key=lambda one: one.gpa):  # some dumps have memory twice, by its virtual addresses
            cut = max(0, covered - one.gpa)
            if cut < one.size:
                self._segments.append(Segment(one.gpa + cut, one.size - cut, one.offset + cut))
                covered = one.gpa + one.size
        self._starts = np.array([one.gpa for one in self._segments], np.uint64)

    def page(self, frame: int) -> np.ndarray | None:
        """The page as uint64[512], or None where the file does not hold all of it, or a snapshot cannot."""
        gpa = frame * PAGE_SIZE
        if gpa >= SNAPSHOT_LIMIT:
            return None
        parts, need = [], PAGE_SIZE
        at = int(np.searchsorted(self._starts, np.uint64(gpa), "right")) - 1
        while need and 0 <= at < len(self._segments):
            one = self._segments[at]
            begin = gpa - one.gpa
            if begin < 0 or begin >= one.size:
                return None
            count = min(need, one.size - begin)
            parts.append(bytes(self._data[one.offset + begin : one.offset + begin + count]))
            gpa, need, at = gpa + count, need - count, at + 1
        return None if need else np.frombuffer(b"".join(parts), np.uint64)


@dataclass(frozen=True)
class Tables:
    """Pages of the page tables by frame, and how many that the tables point to the image does not hold."""

    pages: dict[int, np.ndarray]
    absent: int


def tables_of(image: Image, cpu: Cpu, roots: Iterable[int]) -> Tables:
    """All page-table pages reachable from the roots (values of CR3), in the paging mode of `cpu`."""
    mode = cpu.mode
    pages: dict[int, np.ndarray] = {}
    absent: set[int] = set()
    seen: set[tuple[int, int, int]] = set()
    work: list[tuple[int, int, int]] = []  # frame, level, first entry where only four count, else 0
    mask = int(GPTE32.ADDR if mode in (Mode.TWO_LEVEL, Mode.PAE) else GPTE64.ADDR)
    for root in roots:
        work.append(((root & mask) // PAGE_SIZE, LEVELS[mode], root >> 5 & 127 if mode == Mode.PAE else 0))
    while work:
        item = work.pop()
        if item in seen:
            continue
        seen.add(item)
        frame, level, part = item
        page = pages.get(frame)
        if page is None:
            page = image.page(frame)
            if page is None:
                absent.add(frame)
                continue
            pages[frame] = page
        if level > 1:
            work += [(target, level - 1, 0) for target in targets(page, level, part, cpu) if (target, level - 1, 0) not in seen]
    return Tables(pages, len(absent))


def targets(page: np.ndarray, level: int, part: int, cpu: Cpu) -> list[int]:
    """Frames of the tables that a table of `level` points to."""
    if cpu.mode == Mode.TWO_LEVEL:
        entries = page.view(np.uint32).astype(np.uint64)
        large = GPTE32.PS if cpu.cr4 & int(CR4.PSE) else np.uint64(0)
        address = GPTE32.ADDR
    else:
        entries = page[part * PDPTES : part * PDPTES + PDPTES] if cpu.mode == Mode.PAE and level == 3 else page
        top = level > 3 or (cpu.mode == Mode.PAE and level == 3)
        large = np.uint64(0) if top else GPTE64.PS
        address = GPTE64.ADDR
    pointers = entries[(entries & GPTE64.P != 0) & (entries & large == 0)]
    return np.unique((pointers & address) >> np.uint64(12)).tolist()


def uses_nx(tables: Tables) -> bool:
    """Whether any present entry has bit 63: under PAE paging that is NX, or a reserved bit that no system would set."""
    return any(bool((page & (GPTE64.P | GPTE64.NX) == GPTE64.P | GPTE64.NX).any()) for page in tables.pages.values())


@dataclass
class Registers:
    """Control registers of the snapshot; `cr3` has all roots, the active one first. `efer` None: to be derived."""

    cr0: int
    cr3: list[int]
    cr4: int
    efer: int | None

    def cpu(self, efer: int) -> Cpu:
        """The processor.

        Raises:
            TraceError: no processor accepts such registers, or paging is off.
        """
        try:
            cpu = Cpu(cr0=self.cr0, cr3=self.cr3[0], cr4=self.cr4, efer=efer)
        except ValueError as error:
            raise TraceError(f"registers: {error}") from None
        if cpu.mode == Mode.NONE:
            raise TraceError(f"cr0 is {self.cr0:#x}: paging is off, expected CR0.PG set (--cr0)")
        return cpu


def write_snapshot(file: IO[bytes], image: Image, registers: Registers, long_mode: bool) -> dict[str, object]:
    """Write the snapshot of all tables reachable; returns what was found, by name.

    Raises:
        TraceError: the root is not in the image, or the registers are none.
    """
    efer = registers.efer
    if efer is None:
        efer = int(EFER.LME | EFER.LMA | EFER.NX) if long_mode else 0
    cpu = registers.cpu(efer)
    tables = tables_of(image, cpu, registers.cr3)
    if registers.efer is None and cpu.mode == Mode.PAE and uses_nx(tables):
        efer = int(EFER.NX)
    mask = int(GPTE32.ADDR if cpu.mode in (Mode.TWO_LEVEL, Mode.PAE) else GPTE64.ADDR)
    if (registers.cr3[0] & mask) // PAGE_SIZE not in tables.pages:
        raise TraceError(f"cr3 {registers.cr3[0]:#x}: its page is not in the image, expected a page-table root in it (--cr3)")
    frames = np.array(sorted(tables.pages), np.uint64)
    words = np.array([tables.pages[int(frame)] for frame in frames], np.uint64)
    with NpzWriter(file) as writer:
        writer.array("gfn", frames)
        writer.array("words", words.view(np.uint32) if cpu.mode == Mode.TWO_LEVEL else words)
        writer.array("cr3", np.array(registers.cr3, np.uint64))
        for name, value in (("cr0", registers.cr0), ("cr4", registers.cr4), ("efer", efer)):
            writer.array(name, np.array(value, np.uint64))
    return {
        "paging": {Mode.TWO_LEVEL: "2-level", Mode.PAE: "PAE", Mode.LONG4: "4-level", Mode.LONG5: "5-level"}[cpu.mode],
        "table_pages": len(frames), "absent_table_pages": tables.absent,
        "cr0": hex(registers.cr0), "cr3": [hex(root) for root in registers.cr3], "cr4": hex(registers.cr4), "efer": hex(efer),
    }  # fmt: skip


def raw_segments(size: int, hole: tuple[int, int] | None) -> list[Segment]:
    """A raw image: byte n is guest physical address n; with a hole [start, end) what follows `start` lies from `end` on."""
    if hole is None or size <= hole[0]:
        segments = [Segment(0, size, 0)]
    else:
        segments = [Segment(0, hole[0], 0), Segment(hole[1], size - hole[0], hole[0])]
    if segments[-1].gpa + segments[-1].size > PHYSICAL_LIMIT:
        raise TraceError(f"{size} bytes, expected memory below {PHYSICAL_LIMIT:#x}")
    return segments
