"""What KVM keeps in memory: tables and their entries, memslots with their dirty logs, and one page fault on its way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from fastmmu.reference.walk import ACC_U, ACC_W, ACC_X, Memory

PAGE = 4096


@dataclass
class Leaf:
    """A present entry that maps memory; equal values are what KVM takes for "nothing changed"."""

    executable: bool
    writable: bool
    mmu_writable: bool
    accessed: bool
    dirty: bool
    user: bool = True
    gfn: int | None = None  # where the place in the table does not tell it
    granted: int = field(default=ACC_X | ACC_W | ACC_U, compare=False)  # by the guest, when it was mapped: kept beside the entry


@dataclass
class Device:
    """An MMIO SPTE: the access faults with a reserved bit."""

    gfn: int
    generation: int
    access: int = ACC_U | ACC_W


@dataclass(frozen=True)
class DeviceInfo:
    """The last device page (facts 4.1); `page` of the gva is 0 where the gva says nothing."""

    page: int
    gfn: int
    access: int
    generation: int


@dataclass(eq=False)
class Table:
    """512 entries of the host's table; `gfn` is the first page they map. Only shadow pages have parents and users."""

    gfn: int
    level: int
    entries: dict[int, Leaf | Device | Table] = field(default_factory=dict)
    parents: list[tuple[Table, int]] = field(default_factory=list)
    users: int = 0  # vCPUs that have it as a root
    invalid: bool = False
    nx_split: bool = False  # made because a fetch may not use a huge page, and counted

    def index(self, gfn: int) -> int:
        """Number of the entry that maps `gfn`."""
        return gfn // span(self.level) % 512

    def gfn_of(self, index: int) -> int:
        """First page that an entry maps."""
        return self.gfn + index * span(self.level)

    def visit(self, start: int, end: int, lowest: int = 1) -> Iterator[tuple[Table, int]]:
        """Entries that overlap a range of pages, those of a table after the entry that points to it.

        As in KVM's iterator an entry is visited if it begins before `end`: an empty range at the begin of an entry visits nothing,
        one inside of it does.
        """
        for index in range(max(0, (start - self.gfn) // span(self.level)), 512):
            if self.gfn_of(index) >= end:
                return
            yield self, index
            entry = self.entries.get(index)
            if isinstance(entry, Table) and self.level > lowest:
                yield from entry.visit(start, end, lowest)


def span(level: int) -> int:
    """4 KiB pages that an entry of this level maps."""
    return 1 << 9 * (level - 1)


def path(roots: list[Table | None], gfn: int) -> Iterator[tuple[Table, int]]:
    """Tables from the root down and the index in each; a table that is linked meanwhile is followed. `gfn` may be a gva's page."""
    table = roots[0] if len(roots) == 1 else roots[gfn >> 18]
    while table is not None:
        index = table.index(gfn)
        yield table, index
        entry = table.entries.get(index)
        if not isinstance(entry, Table):
            return
        table = entry


def lowest(roots: list[Table | None], gfn: int) -> tuple[int, Leaf | Device | None]:
    """Level and content of the last entry on the way to a page; level 0 without a root: a PDPTE that is not present."""
    level, entry = 0, None
    for table, index in path(roots, gfn):
        level, entry = table.level, table.entries.get(index)
    return level, entry


@dataclass
class Slot:
    """A memslot. `host_level` is the page size of the host's mapping, `misaligned` the levels at which it is not congruent."""

    gfn: int
    pages: int
    readonly: bool = False
    logging: bool = False
    host_level: int = 1
    misaligned: frozenset[int] = frozenset()
    dirty: set[int] = field(default_factory=set)

    @property
    def end(self) -> int:
        """First page behind the slot."""
        return self.gfn + self.pages

    def start_log(self, manual_protect: int) -> None:
        """A new bitmap (facts 7.1)."""
        self.dirty = set(range(self.pages)) if self.logging and manual_protect & 2 else set()

    def clear_dirty(self, pages: set[int]) -> list[list[int]]:
        """Clear bits; the gfns of those that were set, by words of the bitmap."""
        words: dict[int, list[int]] = {}
        for page in sorted(self.dirty & pages):
            words.setdefault(page // 64, []).append(self.gfn + page)
        self.dirty -= pages
        return list(words.values())

    def huge_level(self, gfn: int, limit: int = 3, forbidden: Iterable[int] = ()) -> int:
        """Largest level at which the page may be mapped (facts 5.9); `forbidden` pages are in no huge one."""
        for level in range(limit, 1, -1):
            start = gfn - gfn % span(level)
            if any(start <= page < start + span(level) for page in forbidden):
                continue
            if self.gfn <= start and start + span(level) <= self.end and level not in self.misaligned:
                return min(level, self.host_level)
        return 1


class GuestMemory(Memory):
    """Guest memory as KVM itself sees it: the memslots and their dirty logs."""

    def __init__(self) -> None:
        super().__init__([])
        self.memslots: dict[int, Slot] = {}

    def slot_at(self, gfn: int) -> Slot | None:
        """The slot of a page."""
        return next((slot for slot in self.memslots.values() if slot.gfn <= gfn < slot.end), None)

    def kind(self, gpa: int) -> str | None:
        """'ram', 'rom' or no slot."""
        slot = self.slot_at(gpa // PAGE)
        return None if slot is None else "rom" if slot.readonly else "ram"

    def write(self, gpa: int, size: int, value: int) -> None:
        """KVM's walker sets a bit: the table's page becomes dirty (facts 1.6)."""
        super().write(gpa, size, value)
        self.mark_dirty(gpa // PAGE)

    def mark_dirty(self, gfn: int) -> None:
        """Log a page (facts 7.2)."""
        slot = self.slot_at(gfn)
        if slot is not None and slot.logging:
            slot.dirty.add(gfn - slot.gfn)


@dataclass
class Fault:
    """One page fault on its way through the handler (facts 5.2)."""

    gfn: int
    code: int
    slot: Slot | None
    max_level: int
    address: int = 0  # that the hardware reports
    access: int = ACC_X | ACC_W | ACC_U  # of the guest's tables
