"""Walks in two dimensions in plain Python: the guest's walk on a memory each of whose reads is translated by the other dimension.

Intel SDM, volume 3, 29.3; AMD APM, volume 2, 15.25.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastmmu.bits import PFERR
from fastmmu.paging import Cpu
from fastmmu.reference.ept import EptExit, EptWalker, Outside
from fastmmu.reference.walk import ACC_U, PFERR_F, PFERR_U, PFERR_W, A, D, Memory, Walker

READ, WRITE, FETCH = 1, 2, 4
NESTED_PAGE_FAULT = 0x400
GUEST_FINAL, GUEST_PAGE = int(PFERR.GUEST_FINAL), int(PFERR.GUEST_PAGE)


@dataclass(frozen=True)
class Answer:
    """Of a two-dimensional walk: the fields of fastmmu's own."""

    ok: bool = False
    hpa: int = 0
    gpa: int = 0
    level: int = 0
    access: int = 0
    pferr: int = 0
    reason: int = 0
    qualification: int = 0


class NestedExit(Exception):
    """The second dimension has failed for a guest physical address."""

    def __init__(self, gpa: int, reason: int, qualification: int) -> None:
        super().__init__(f"gpa {gpa:#x}: exit {reason}, {qualification:#x}")
        self.gpa, self.reason, self.qualification = gpa, reason, qualification


class EptDimension:
    """An EPT as the second dimension."""

    def __init__(self, walker: EptWalker) -> None:
        self.walker, self.memory = walker, walker.memory
        self.tables_are_written = walker.flags
        self.reads = walker.reads

    def translate(self, gpa: int, access: int, structure: bool, user_linear: bool) -> int:
        """hpa of a gpa."""
        try:
            return self.walker.walk(gpa, access, structure, user_linear).hpa
        except EptExit as left:
            raise NestedExit(gpa, left.reason, left.qualification) from None


class NptDimension:
    """AMD's nested tables as the second dimension."""

    tables_are_written = True

    def __init__(self, memory: Memory, cpu: Cpu) -> None:
        self.memory, self.cpu = memory, cpu
        self.walker = Walker(memory, cpu)
        self.reads: list[int] = []

    def translate(self, gpa: int, access: int, structure: bool, user_linear: bool) -> int:
        """hpa of a gpa: always an access by a user, to a table always a write (15.25.5)."""
        code = PFERR_U
        if structure or access & WRITE:
            code |= PFERR_W
        elif access & FETCH:
            code |= PFERR_F
        where = GUEST_PAGE if structure else GUEST_FINAL
        if gpa >> 12 + 9 * self.walker.levels:
            raise NestedExit(gpa, NESTED_PAGE_FAULT, self.walker.fault(0, 0, code).pferr | where)
        walk = self.walker.walk(self.cpu.cr3, gpa, code)
        if not walk.ok:
            raise NestedExit(gpa, NESTED_PAGE_FAULT, walk.pferr | where)
        return walk.gpa


class GuestTables(Memory):
    """The guest's memory as its own walk sees it."""

    def __init__(self, dimension: EptDimension | NptDimension) -> None:
        super().__init__([])
        self.dimension = dimension
        self.host = dimension.memory
        self.used: list[tuple[int, int, int]] = []  # gpa, hpa and value of the entries read

    def kind(self, gpa: int) -> str:
        """The second dimension decides."""
        return "ram"

    def read(self, gpa: int, size: int) -> int:
        """An entry of the guest's tables."""
        hpa = self.dimension.translate(gpa, READ, True, False)
        if self.host.kind(hpa) is None:
            raise Outside(f"{hpa:#x}")
        entry = self.host.read(hpa, size)
        self.used.append((gpa, hpa, entry))
        return entry


class GuestWalker(Walker):
    """The guest's walk, with the PDPTEs that the last load of CR3 has found."""

    pdptes: tuple[int, ...] = (0, 0, 0, 0)

    def load_pdptes(self, cr3: int) -> list[int]:
        """They are registers."""
        return list(self.pdptes)


class NestedWalker:
    """A guest's registers over a second dimension."""

    def __init__(self, dimension: EptDimension | NptDimension, cpu: Cpu) -> None:
        self.dimension, self.cpu = dimension, cpu
        self.tables = GuestTables(dimension)
        self.walker = GuestWalker(self.tables, cpu)

    def walk(self, gva: int, access: int) -> Answer:
        """Translate; A and D are set in both dimensions.

        Raises:
            Outside: a table lies outside memory.
        """
        if not self.walker.is_address(gva):
            return Answer()
        used = self.tables.used
        used.clear()
        try:
            walk = self.walker.walk(self.cpu.cr3, gva, access, update=False)
            if not walk.ok:
                return Answer(level=walk.level, pferr=walk.pferr)
        except NestedExit as left:
            level = (self.walker.levels if self.walker.paging else 0) - len(used)
            return Answer(gpa=left.gpa, level=level, reason=left.reason, qualification=left.qualification)
        size = 8 if self.walker.pae else 4
        wanted = [entry | A | (D if number == len(used) and access & PFERR_W else 0) for number, (*_, entry) in enumerate(used, 1)]
        level = self.walker.levels
        try:
            for (gpa, _, entry), new in zip(used, wanted, strict=True):
                if new != entry and not self.dimension.tables_are_written:
                    self.dimension.translate(gpa, READ | WRITE, True, False)
                level -= 1
            for (_, hpa, _), new in zip(used, wanted, strict=True):
                if self.tables.host.kind(hpa) == "ram":
                    self.tables.host.write(hpa, size, self.tables.host.read(hpa, size) | new)
            kind = WRITE if access & PFERR_W else FETCH if access & PFERR_F else READ
            level = walk.level
            hpa = self.dimension.translate(walk.gpa, kind, False, bool(walk.access & ACC_U))
        except NestedExit as left:
            return Answer(gpa=left.gpa, level=level, reason=left.reason, qualification=left.qualification)
        return Answer(True, hpa, walk.gpa, walk.level, walk.access)
